"""Checks the health of engines while a batch is sampled."""

import asyncio
import time
from collections.abc import Iterable, Sequence

from megatron_dsrl.rollout.engine_states import EngineStates
from megatron_dsrl.rollout.engines.client import EngineClient
from megatron_dsrl.rollout.engines.errors import EngineError
from megatron_dsrl.rollout.open_files import TooManyOpenFilesError

GRACE_SECONDS = 5.0
"""Time for a check in progress to finish when the batch ends, so that it does not run into the next batch."""


class EngineHealth:
    """One task per engine; it ends with the reason when the engine is lost."""

    def __init__(
        self,
        clients: Sequence[EngineClient],
        interval_seconds: float,
        timeout_seconds: float,
        states: EngineStates,
    ) -> None:
        """
        Args:
            clients: one per engine.
            interval_seconds: time between two checks of an engine.
            timeout_seconds: an engine that has passed no check for this long is lost.
            states: says when engines cannot answer, because they are loading weights.
        """
        self.monitors: dict[asyncio.Task[str], int] = {}
        """The engine that each task watches."""
        self._clients = clients
        self._interval_seconds = interval_seconds
        self._timeout_seconds = timeout_seconds
        self._states = states
        self._ended = asyncio.Event()

    def watch(self, engines: Iterable[int]) -> None:
        """Check these engines from now on, if they are not being checked already."""
        for engine in set(engines).difference(self.monitors.values()):
            self.monitors[asyncio.create_task(self._monitor(self._clients[engine]))] = engine

    async def check(self, engine: int) -> None:
        """Check an engine now.

        Raises:
            EngineError: it makes no progress.
            TooManyOpenFilesError: this process has no descriptor for the check.
        """
        await self._clients[engine].check_health(self._timeout_seconds)

    def stop_watching(self, engine: int) -> None:
        """Stop checking an engine."""
        for task, watched in list(self.monitors.items()):
            if watched == engine:
                task.cancel()
                del self.monitors[task]

    async def close(self) -> None:
        """Stop checking all engines."""
        self._ended.set()
        if self.monitors:
            await asyncio.wait(self.monitors, timeout=GRACE_SECONDS)
            for task in self.monitors:
                task.cancel()
            await asyncio.gather(*self.monitors, return_exceptions=True)

    async def _monitor(self, client: EngineClient) -> str:
        """Returns when the engine is lost, with the reason, or when the batch has ended."""
        healthy = time.monotonic()
        while not self._ended.is_set():
            try:
                await asyncio.wait_for(self._ended.wait(), self._interval_seconds)
            except TimeoutError:
                if self._states.is_loading:
                    healthy = time.monotonic()
                    continue
                try:
                    await client.check_health(self._timeout_seconds)
                    healthy = time.monotonic()
                except EngineError as error:
                    if time.monotonic() - healthy > self._timeout_seconds:
                        return f"{error}; it has passed no health check for engine.health_timeout_seconds"
                except TooManyOpenFilesError:  # says nothing about the engine
                    healthy = time.monotonic()
        return ""
