"""Where a batch's groups come from, and when there are enough of them."""

from collections.abc import Sequence
from typing import Protocol

from megatron_dsrl.rollout.sample import SampleGroup
from megatron_dsrl.rollout.unfinished import UnfinishedGroup


class Feed(Protocol):
    """Source of a batch's groups; decides when there are enough."""

    def take(self, in_flight: int) -> list[UnfinishedGroup]:
        """Groups to start or to continue, given the number of groups in flight."""

    def judged(self, group: SampleGroup) -> None:
        """Called with every group that is finished."""

    def is_enough(self) -> bool:
        """Whether the groups still in flight should be aborted."""


class WholeFeed:
    """Gives all groups at once and needs all of them."""

    def __init__(self, groups: Sequence[UnfinishedGroup]) -> None:
        self._groups = list(groups)

    def take(self, in_flight: int) -> list[UnfinishedGroup]:
        """All groups at the first call, none after it."""
        groups, self._groups = self._groups, []
        return groups

    def judged(self, group: SampleGroup) -> None:
        """Nothing depends on the outcome of a group."""

    def is_enough(self) -> bool:
        """Never: every group is sampled to its end."""
        return False
