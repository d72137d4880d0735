"""Sample filters: which samples of a rollout batch are updated.

NSR keeps negative samples (A < 0), PSR positive ones (A > 0). A dropped sample leaves the numerator and the
denominator of the loss alike: its token mask is zero. A sample whose tokens differ in their advantages is judged by
their sum.
"""

from abc import abstractmethod
from typing import Literal

import torch
from torch import Tensor

from megatron_dsrl.algorithms.experience import Experience
from megatron_dsrl.config.phase import FILTERS
from megatron_dsrl.config.registry import Options


class FilterOptions(Options):
    """Base of sample filters: the fields are the options, `keep` decides."""

    @abstractmethod
    def keep(self, experience: Experience) -> Tensor:
        """Which samples of a whole rollout batch with advantages stay: [num_sequences] bool."""


@FILTERS.register
class All(FilterOptions):
    """Every sample."""

    name: Literal["all"] = "all"

    def keep(self, experience: Experience) -> Tensor:
        return torch.ones(len(experience), dtype=torch.bool)


@FILTERS.register
class Negative(FilterOptions):
    """NSR: samples with A < 0. Under a group baseline, groups that are all right or all wrong have A = 0."""

    name: Literal["negative"] = "negative"

    def keep(self, experience: Experience) -> Tensor:
        return experience.sample_advantages < 0


@FILTERS.register
class Positive(FilterOptions):
    """PSR: samples with A > 0. Under a group baseline, groups that are all right or all wrong have A = 0."""

    name: Literal["positive"] = "positive"

    def keep(self, experience: Experience) -> Tensor:
        return experience.sample_advantages > 0
