"""Where a batch's groups come from, and when there are enough of them."""

import asyncio
from collections.abc import Sequence
from typing import Protocol

from megatron_dsrl.rollout.sample import SampleGroup
from megatron_dsrl.rollout.unfinished import UnfinishedGroup


class Wake:
    """Tells the event loop of a batch that its feed has more to give. `set` may be called from any thread."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._event = asyncio.Event()

    def attach(self) -> None:
        """Wake the running event loop from now on."""
        self._loop, self._event = asyncio.get_running_loop(), asyncio.Event()

    def set(self) -> None:
        """Let `wait` return; no effect without an event loop."""
        loop, event = self._loop, self._event
        if loop is not None and not loop.is_closed():
            loop.call_soon_threadsafe(event.set)

    async def wait(self) -> None:
        """Wait for the next `set`."""
        await self._event.wait()
        self._event.clear()


class Feed(Protocol):
    """Source of a batch's groups; decides when there are enough."""

    @property
    def wake(self) -> Wake | None:
        """Set when there may be more to take although no group has been judged, or when there is enough. None: that
        never happens, and the batch ends when all that it has taken is judged."""

    def take(self, in_flight: int) -> list[UnfinishedGroup]:
        """Groups to start or to continue, given the number of groups in flight."""

    def judged(self, position: int, group: SampleGroup) -> None:
        """Called with every group that is finished.

        Args:
            position: its place in the order in which groups were taken, from 0.
            group: the group.
        """

    def is_enough(self) -> bool:
        """Whether the groups still in flight should be aborted."""


class WholeFeed:
    """Gives all groups at once and needs all of them."""

    wake = None

    def __init__(self, groups: Sequence[UnfinishedGroup]) -> None:
        self._groups = list(groups)

    def take(self, in_flight: int) -> list[UnfinishedGroup]:
        """All groups at the first call, none after it."""
        groups, self._groups = self._groups, []
        return groups

    def judged(self, position: int, group: SampleGroup) -> None:
        """Nothing depends on the outcome of a group."""

    def is_enough(self) -> bool:
        """Never: every group is sampled to its end."""
        return False
