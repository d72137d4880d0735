"""Sample filters: which samples of a rollout batch are trained on.

NSR keeps negative samples (A < 0), PSR positive ones (A > 0). A dropped sample counts in neither the numerator nor the
denominator of the loss. If the tokens of a sample have different advantages, their sum decides.
"""

from abc import abstractmethod
from typing import Literal

import torch
from torch import Tensor

from megatron_dsrl.algorithms.experience import Experience
from megatron_dsrl.config.choices import FILTERS
from megatron_dsrl.config.registry import Options


class FilterOptions(Options):
    """Base class of sample filters: fields are options, `keep` decides."""

    @abstractmethod
    def keep(self, experience: Experience) -> Tensor:
        """[num_sequences] bool: which samples of a whole rollout batch with advantages to keep."""


@FILTERS.register
class All(FilterOptions):
    """Every sample."""

    name: Literal["all"] = "all"

    def keep(self, experience: Experience) -> Tensor:
        return torch.ones(len(experience), dtype=torch.bool)


@FILTERS.register
class Negative(FilterOptions):
    """NSR (arXiv 2506.01347): samples with A < 0. Under a group baseline, all-right and all-wrong groups have A = 0."""

    name: Literal["negative"] = "negative"

    def keep(self, experience: Experience) -> Tensor:
        return experience.sample_advantages < 0


@FILTERS.register
class Positive(FilterOptions):
    """PSR (arXiv 2506.01347): samples with A > 0. Under a group baseline, all-right and all-wrong groups have A = 0."""

    name: Literal["positive"] = "positive"

    def keep(self, experience: Experience) -> Tensor:
        return experience.sample_advantages > 0
