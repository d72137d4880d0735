"""Remedies for updates without the prompt where mistakes are hard to see, as options of the filter."""

import torch
from pydantic import Field
from torch import Tensor

from megatron_dsrl.algorithms.experience import Experience
from megatron_dsrl.algorithms.filters import FilterOptions


class WrongAndSaysSo(FilterOptions):
    """Negative samples whose response has a certain token, such as the verdict ` No.`: the mistake can be seen without
    the prompt. The others are left to the phase that sees the prompt."""

    token_id: int = Field(ge=0)
    """The token."""

    def keep(self, experience: Experience) -> Tensor:
        says_so = [self.token_id in one.token_ids[one.num_context :] for one in experience.sequences]
        return torch.tensor(says_so) & (experience.sample_advantages < 0)
