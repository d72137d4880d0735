"""Sample until enough groups are accepted: the common part of dynamic sampling and partial rollouts.

Prompts whose group is not accepted are replaced at once. When there are enough groups, those still in flight are
aborted: dynamic sampling drops them, partial rollouts continue them in the next step (`carry_over.py`). Aborting
favours short responses, unless the next step continues them.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_dsrl.config.run import RolloutSettings
from megatron_dsrl.data.prompt import Prompt
from megatron_dsrl.rollout.batch import BatchSampler, RolloutBatch
from megatron_dsrl.rollout.carry_over import CarryOver, restart_expired
from megatron_dsrl.rollout.progress import OnSamples, ignore
from megatron_dsrl.rollout.sample import SampleGroup
from megatron_dsrl.rollout.seeds import seeds_of_batch, stream_of_round
from megatron_dsrl.rollout.unfinished import UnfinishedGroup, new_groups


@dataclass(frozen=True)
class SampledUntil:
    """The result of a batch that ends when it has enough groups."""

    accepted: list[SampleGroup]
    """In the order in which they were started; fewer than the step takes if its limit was reached first."""
    rejected: list[SampleGroup]
    left: CarryOver
    """Groups that the step does not need: accepted beyond its number, or aborted."""
    expired_groups: int
    """Carried-over groups that were restarted because they would have mixed too many weight versions."""
    generated_tokens: int
    """Response tokens that the engines produced in this step."""


def sample_until(
    config: RolloutSettings,
    engines: BatchSampler,
    step: int,
    draw: Callable[[int], Sequence[Prompt]],
    accept: Callable[[SampleGroup], bool],
    carried: CarryOver,
    on_samples: OnSamples = ignore,
) -> SampledUntil:
    """Continue what the previous step left, start new prompts, and stop once `prompts_per_step` groups are accepted.

    Args:
        config: number of groups, how many at a time, and limits.
        engines: where they are sampled.
        step: counted from 1; names the random numbers.
        draw: draw(n) returns the next n prompts.
        accept: whether a group counts.
        carried: what the previous step left.
        on_samples: called with the number of samples that have just come back.
    """
    section, dynamic, seen = config.rollout, config.rollout.dynamic_sampling, Counter[int]()
    assert not section.deterministic, "which groups come first depends on timing"

    def seeds(prompts: Sequence[Prompt]) -> list[tuple[int, ...]]:
        return seeds_of_batch(config.seed, stream_of_round(step, 0), prompts, section.samples_per_prompt, seen)

    def start(number: int) -> list[UnfinishedGroup]:
        prompts = draw(number)
        return new_groups(prompts, seeds(prompts))

    versions = section.partial_rollouts.max_weight_versions if section.partial_rollouts else 1
    carried, expired = restart_expired(carried, engines.weight_version, versions, seeds)
    max_started = math.ceil(section.prompts_per_step * section.oversampling) * (dynamic.max_rounds if dynamic else 1)
    feed = UntilEnough(section.prompts_per_step, accept, start, section.oversampling, max_started, carried)
    return feed.outcome(engines.sample_batch(feed, engines.training_sampling, on_samples), expired)


class UntilEnough:
    """Feeds a batch until enough of its groups are accepted. Which ones these are depends on timing."""

    wake = None

    def __init__(
        self,
        wanted: int,
        accept: Callable[[SampleGroup], bool],
        start: Callable[[int], list[UnfinishedGroup]],
        oversampling: float,
        max_started: int,
        carried: CarryOver,
    ) -> None:
        """
        Args:
            wanted: number of accepted groups to stop at.
            accept: whether a group counts.
            start: start(n) returns n groups with the next prompts.
            oversampling: groups in flight per group that is still missing.
            max_started: limit of new groups; the batch then ends with fewer than wanted.
            carried: what the previous step left.
        """
        self._wanted = wanted
        self._accept = accept
        self._start = start
        self._oversampling = oversampling
        self._max_started = max_started
        self._carried = carried
        self._to_continue = list(carried.unfinished)
        self._started = 0
        self._accepted: list[SampleGroup] = []
        self._rejected: list[SampleGroup] = []
        for group in carried.finished:
            self._sort(group)

    def take(self, in_flight: int) -> list[UnfinishedGroup]:
        """Carried-over groups first, then as many new ones as keep enough in flight."""
        groups, self._to_continue = self._to_continue, []
        missing = math.ceil((self._wanted - len(self._accepted)) * self._oversampling) - in_flight - len(groups)
        count = min(missing, self._max_started - self._started)
        if count > 0:
            self._started += count
            groups += self._start(count)
        return groups

    def judged(self, position: int, group: SampleGroup) -> None:
        """Sort a finished group into accepted or rejected."""
        self._sort(group)

    def _sort(self, group: SampleGroup) -> None:
        (self._accepted if self._accept(group) else self._rejected).append(group)

    def is_enough(self) -> bool:
        """Whether the wanted number of groups has been accepted."""
        return len(self._accepted) >= self._wanted

    def outcome(self, batch: RolloutBatch, expired_groups: int) -> SampledUntil:
        """The result of the finished batch.

        Args:
            batch: the batch that this feed has ended.
            expired_groups: number of carried-over groups that were restarted.
        """
        positions = {id(group): position for position, group in batch.finished.items()}
        # groups finished in the previous step come first
        accepted = sorted(self._accepted[: self._wanted], key=lambda group: positions.get(id(group), -1))
        left = CarryOver(tuple(self._accepted[self._wanted :]), tuple(batch.unfinished_groups))
        everything = CarryOver((*self._accepted, *self._rejected), left.unfinished)
        generated = everything.num_tokens - self._carried.num_tokens
        return SampledUntil(accepted, self._rejected, left, expired_groups, generated)
