"""Several prompt sets in one run, in proportion to their weights, and the sampler of a run with one set or several."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate
from typing import TypedDict

from megatron_dsrl.common.errors import UserError
from megatron_dsrl.config.data import DataConfig
from megatron_dsrl.data.prompt import Prompt
from megatron_dsrl.data.samplers import PromptSampler, SamplerState


class MixtureState(TypedDict):
    """Where each set's sampler is."""

    sets: list[SamplerState]


class MixtureSampler:
    """Draws from several sets so that after any number of draws each set is within a prompt of its share.

    The next prompt is from the set that is furthest behind its share. The order depends only on weights and seeds.
    """

    def __init__(self, samplers: Sequence[PromptSampler], sizes: Sequence[int], weights: Sequence[float]) -> None:
        """Samplers, numbers of prompts, and weights relative to each other: one of each per set."""
        self._samplers = list(samplers)
        self._first = [0, *accumulate(sizes)][: len(sizes)]
        self._shares = [weight / sum(weights) for weight in weights]

    def next(self, count: int) -> list[int]:
        """Positions of the next `count` prompts in the concatenation of the sets."""
        return [self._next() for _ in range(count)]

    def state_dict(self) -> MixtureState:
        """The current position in the sequence."""
        return MixtureState(sets=[sampler.state_dict() for sampler in self._samplers])

    def load_state_dict(self, state: SamplerState | MixtureState) -> None:
        """Continue from `state`. Raises UserError if it belongs to other prompt sets or another seed."""
        saved = state.get("sets")
        if not isinstance(saved, list) or len(saved) != len(self._samplers):
            count = len(saved) if isinstance(saved, list) else 1
            raise UserError(
                f"data.mixed_with: the checkpoint was written with {count} prompt set(s), this run has "
                f"{len(self._samplers)}; a run can only be resumed with the sets that it was started with"
            )
        for sampler, one in zip(self._samplers, saved, strict=True):
            sampler.load_state_dict(one)

    def _next(self) -> int:
        taken = [sampler.num_drawn for sampler in self._samplers]
        behind = [share * (sum(taken) + 1) - count for share, count in zip(self._shares, taken, strict=True)]
        chosen = behind.index(max(behind))
        return self._first[chosen] + self._samplers[chosen].next(1)[0]


Sampler = PromptSampler | MixtureSampler


def in_mixture(sets: Sequence[tuple[str, Sequence[Prompt]]]) -> list[Prompt]:
    """The prompts of all sets, one after the other, with the set's name and their index in the mixture; those of a
    single set as they are."""
    if len(sets) == 1:
        return list(sets[0][1])
    prompts: list[Prompt] = []
    first = 0
    for name, members in sets:
        prompts += [replace(prompt, index=first + prompt.index, prompt_set=name) for prompt in members]
        first = max((prompt.index for prompt in prompts), default=-1) + 1
    return prompts


def build_sampler(config: DataConfig, prompts: Sequence[Prompt], seed: int) -> Sampler:
    """The sampler of a run's prompts, which `in_mixture` has put in the order of the sets. Raises UserError if a set
    has no prompts, or the sampler cannot order them."""
    if not config.mixed_with:
        return PromptSampler(len(prompts), seed, partial(config.sampler.reorder, prompts))
    members = [[prompt for prompt in prompts if prompt.prompt_set == one.name] for one in config.sets]
    samplers = [PromptSampler(len(some), seed, partial(config.sampler.reorder, some)) for some in members]
    return MixtureSampler(samplers, [len(some) for some in members], [one.weight for one in config.sets])
