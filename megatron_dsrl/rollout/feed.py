"""What a batch that is being sampled has around it: where its groups come from, and who is told what happens."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from megatron_dsrl.observability.timeline import EngineCall
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
        """Called with every finished group, and its place in the order in which groups were taken, from 0."""

    def is_enough(self) -> bool:
        """Whether the groups still in flight should be aborted."""


class WholeFeed:
    """Gives all groups at once and needs all of them."""

    wake = None

    def __init__(self, groups: Sequence[UnfinishedGroup]) -> None:
        self._groups = list(groups)

    def take(self, in_flight: int) -> list[UnfinishedGroup]:
        groups, self._groups = self._groups, []
        return groups

    def judged(self, position: int, group: SampleGroup) -> None:
        """Nothing depends on the outcome of a group."""

    def is_enough(self) -> bool:
        return False


OnSamples = Callable[[int], None]
"""Called with the number of samples that have just come back."""
OnGroup = Callable[[int, SampleGroup], None]
"""Called with every group and its position in the batch as soon as it is judged, in any order."""
OnCall = Callable[[EngineCall], None]
"""Called with every finished call to an engine."""


def ignore(*progress: object) -> None:
    """A callback that does nothing."""


@dataclass(frozen=True)
class BatchProgress:
    """Who is told what happens while a batch is sampled."""

    on_samples: OnSamples = ignore
    on_group: OnGroup = ignore
    on_call: OnCall = ignore
