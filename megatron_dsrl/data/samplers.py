"""Orders of the prompts of a set: the values of `data.sampler`.

For a custom order, such as a curriculum, subclass `SamplerOptions` and name it by its dotted path.
"""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Literal

from megatron_dsrl.common.errors import UserError
from megatron_dsrl.config.choices import SAMPLERS
from megatron_dsrl.config.registry import Options
from megatron_dsrl.data.prompt import Prompt


class SamplerOptions(Options):
    """Base class of prompt samplers: fields are options, `reorder` decides the order of an epoch."""

    @abstractmethod
    def reorder(self, prompts: Sequence[Prompt], epoch: int, shuffled: list[int]) -> list[int]:
        """Positions in `prompts` in the order of an epoch. It must be the same for the same arguments, so that a run
        can resume.

        Args:
            prompts: the prompts of the set.
            epoch: counted from 0.
            shuffled: all positions, shuffled by the run's seed and the epoch.
        """


@SAMPLERS.register
class Shuffled(SamplerOptions):
    """Every epoch is shuffled."""

    name: Literal["shuffled"] = "shuffled"

    def reorder(self, prompts: Sequence[Prompt], epoch: int, shuffled: list[int]) -> list[int]:
        return shuffled


@SAMPLERS.register
class EasyFirst(SamplerOptions):
    """A curriculum: prompts with a higher pass rate first, equal ones shuffled, unknown ones last."""

    name: Literal["easy_first"] = "easy_first"

    epochs: int | None = None
    """Number of epochs in this order; later ones are shuffled. null: all."""

    def reorder(self, prompts: Sequence[Prompt], epoch: int, shuffled: list[int]) -> list[int]:
        if all(prompt.pass_rate is None for prompt in prompts):
            raise UserError("data.sampler: easy_first needs pass rates; set data.pass_rates_from to a recorded run")
        if self.epochs is not None and epoch >= self.epochs:
            return shuffled

        def difficulty(position: int) -> float:
            rate = prompts[position].pass_rate
            return 2.0 if rate is None else 1.0 - rate

        return sorted(shuffled, key=difficulty)
