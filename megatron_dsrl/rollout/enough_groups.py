"""How a step knows that it has enough groups.

Dynamic sampling (DAPO): only mixed groups count, and one that does not is replaced by the next prompt at once. Where
more groups are on their way than the step needs, the rest is aborted when it has enough.

Partial rollouts: all groups count, without dynamic sampling, and what is aborted goes on in the next step
(`carry_over.py`).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from megatron_dsrl.rollout.batch import Batch
from megatron_dsrl.rollout.carry_over import CarryOver
from megatron_dsrl.rollout.sample import Group
from megatron_dsrl.rollout.unfinished import UnfinishedGroup


@dataclass
class EnoughFeed:
    """Feeds a batch until enough of its groups are accepted. Which ones these are is decided by time."""

    wanted: int
    accept: Callable[[Group], bool]
    begin: Callable[[int], list[UnfinishedGroup]]
    """Begins so many groups with the next prompts."""
    oversampling: float
    """Groups on their way per group that is still missing."""
    max_begun: int
    """New groups at most; after that the step goes on with what there is."""
    carried: CarryOver = CarryOver()
    """From the step before."""
    accepted: list[Group] = field(default_factory=list)
    rejected: list[Group] = field(default_factory=list)
    begun: int = 0

    def __post_init__(self) -> None:
        self._to_continue = list(self.carried.unfinished)
        for group in self.carried.finished:
            self.judged(group)

    def take(self, on_their_way: int) -> list[UnfinishedGroup]:
        """What is carried over first; then new groups, as many as keep enough on their way."""
        groups, self._to_continue = self._to_continue, []
        missing = math.ceil((self.wanted - len(self.accepted)) * self.oversampling) - on_their_way - len(groups)
        count = min(missing, self.max_begun - self.begun)
        if count > 0:
            self.begun += count
            groups += self.begin(count)
        return groups

    def judged(self, group: Group) -> None:
        (self.accepted if self.accept(group) else self.rejected).append(group)

    def is_enough(self) -> bool:
        return len(self.accepted) >= self.wanted


@dataclass(frozen=True)
class EnoughGroups:
    """The rollout of a step that ends when it has enough."""

    accepted: list[Group]
    """As many as the step takes, if it could be had, in the order in which they were begun."""
    rejected: list[Group]
    left: CarryOver
    """What the step does not need: accepted beyond its number, or aborted."""
    expired_groups: int
    """Of what was carried over to this step: begun anew, since it would have had tokens of too many weight versions."""
    generated_tokens: int
    """Response tokens that the engines have produced now."""


def enough_groups(batch: Batch, feed: EnoughFeed, expired_groups: int) -> EnoughGroups:
    """What has come of a batch that the feed has ended.

    Args:
        batch: after its end.
        feed: that it was fed by.
        expired_groups: of what was carried over; see `carry_over.fit_for`.
    """
    positions = {id(group): position for position, group in batch.finished.items()}
    # those that the step before had finished come first
    accepted = sorted(feed.accepted[: feed.wanted], key=lambda group: positions.get(id(group), -1))
    left = CarryOver(tuple(feed.accepted[feed.wanted :]), tuple(batch.unfinished_groups))
    everything = CarryOver((*feed.accepted, *feed.rejected), left.unfinished)
    generated = everything.num_tokens - feed.carried.num_tokens
    return EnoughGroups(accepted, feed.rejected, left, expired_groups, generated)
