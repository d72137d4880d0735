"""Which prompts come next: epochs, deterministic and resumable, each in the order of `data.sampler`.

For a custom order, such as a curriculum, subclass `SamplerOptions` and name it by its dotted path.
"""

import random
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypedDict

from megatron_dsrl.common.errors import UserError
from megatron_dsrl.config.choices import SAMPLERS
from megatron_dsrl.config.registry import Options
from megatron_dsrl.data.prompt import Prompt

Reorder = Callable[[int, list[int]], list[int]]
"""reorder(epoch, shuffled) returns the same indices in the order of this epoch, counted from 0."""


def as_shuffled(epoch: int, shuffled: list[int]) -> list[int]:
    """The shuffled order itself."""
    return shuffled


class SamplerState(TypedDict):
    """Everything that determines the rest of the sequence, as plain numbers for a checkpoint."""

    num_prompts: int
    seed: int
    epoch: int
    position: int


class PromptSampler:
    """An endless sequence of prompt indices: one shuffled epoch after another.

    Each epoch contains every index once. A batch that reaches the end of an epoch continues with the next one, so only
    such a batch can contain an index twice. The order of an epoch depends only on the seed and the epoch's number.
    """

    def __init__(self, num_prompts: int, seed: int, reorder: Reorder = as_shuffled) -> None:
        """Raises UserError if the set is empty."""
        if num_prompts < 1:
            raise UserError(f"data: a prompt set needs at least one prompt, this one has {num_prompts}")
        self._num_prompts = num_prompts
        self._seed = seed
        self._reorder = reorder
        self._start_epoch(0)

    def next(self, count: int) -> list[int]:
        """The next `count` prompt indices, each in 0..num_prompts - 1."""
        indices: list[int] = []
        while len(indices) < count:
            if self._position == self._num_prompts:
                self._start_epoch(self._epoch + 1)
            taken = self._order[self._position : self._position + count - len(indices)]
            self._position += len(taken)
            indices += taken
        return indices

    @property
    def num_drawn(self) -> int:
        """Number of prompts drawn since the first epoch began."""
        return self._epoch * self._num_prompts + self._position

    def state_dict(self) -> SamplerState:
        """The current position in the sequence."""
        return SamplerState(num_prompts=self._num_prompts, seed=self._seed, epoch=self._epoch, position=self._position)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`. Raises UserError if it belongs to another prompt set or seed."""
        if "sets" in state:
            raise UserError(
                f"data.mixed_with: the checkpoint was written with {len(state['sets'])} prompt sets, this run has one; "
                "a run can only be resumed with the sets that it was started with"
            )
        for field, what, saved, here in (
            ("data.source", "number of prompts", state["num_prompts"], self._num_prompts),
            ("seed", "seed", state["seed"], self._seed),
        ):
            if saved != here:
                raise UserError(
                    f"{field}: the checkpoint was written with {saved} as the {what}, now it is {here}; a run can only "
                    "be resumed with the prompt set and the seed that it was started with"
                )
        self._start_epoch(state["epoch"])
        self._position = state["position"]

    def _start_epoch(self, epoch: int) -> None:
        self._epoch = epoch
        self._position = 0
        shuffled = list(range(self._num_prompts))
        random.Random(f"{self._seed}/{epoch}").shuffle(shuffled)
        self._order = self._reorder(epoch, shuffled)
        if sorted(self._order) != list(range(self._num_prompts)):
            raise UserError("data.sampler: `reorder` must return every position once, in any order")


class SamplerOptions(Options):
    """Base class of prompt samplers: fields are options, `reorder` decides the order of an epoch."""

    @abstractmethod
    def reorder(self, prompts: Sequence[Prompt], epoch: int, shuffled: list[int]) -> list[int]:
        """Positions in `prompts` in the order of an epoch. It must be the same for the same arguments, so that a run
        can resume.

        Args:
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
