"""What every batch that is being sampled knows about the engines: which are lost, busy, loading weights, or healthy.

Several batches may run at the same time, in separate threads: an evaluation beside asynchronous sampling.
"""

import asyncio
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from megatron_dsrl.rollout.engines.client import EngineClient
from megatron_dsrl.rollout.engines.errors import EngineError
from megatron_dsrl.rollout.open_files import TooManyOpenFilesError

GRACE_SECONDS = 5.0
"""Time for a check in progress to finish when the batch ends, so that it does not run into the next batch."""


class EngineUse:
    """How much of the time engines have nothing to do."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: dict[int, int] = {}
        """Calls that each engine is working on."""
        self._busy_since: dict[int, float] = {}
        self._busy_seconds = 0.0
        self._begin: float | None = None
        """When the time that is accounted for began: with the first call, or the last `idle_fraction`."""

    def started(self, engine: int) -> None:
        with self._lock:
            now = time.monotonic()
            self._begin = now if self._begin is None else self._begin
            self._running[engine] = self._running.get(engine, 0) + 1
            self._busy_since.setdefault(engine, now)

    def ended(self, engine: int) -> None:
        with self._lock:
            self._running[engine] -= 1
            if not self._running[engine]:
                self._busy_seconds += time.monotonic() - self._busy_since.pop(engine)

    def idle_fraction(self, engines: int) -> float | None:
        """Fraction of the time since the last call of this method in which an engine had no call, averaged over this
        many engines; None if no time has passed."""
        with self._lock:
            now = time.monotonic()
            busy = self._busy_seconds + sum(now - since for since in self._busy_since.values())
            begin = self._begin
            if begin is None or now <= begin:
                return None
            self._begin = now
            self._busy_seconds, self._busy_since = 0.0, dict.fromkeys(self._busy_since, now)
        return max(0.0, 1.0 - busy / (engines * (now - begin)))


@dataclass
class EngineStates:
    """Shared by the batches and by those who restart engines and give them weights."""

    lost: dict[int, str] = field(default_factory=dict)
    """Why an engine must not be used, by engine number."""
    is_loading: bool = False
    """Whether weights are being loaded: engines then do not answer."""
    use: EngineUse = field(default_factory=EngineUse)


class EngineHealth:
    """One task per engine; it ends with the reason when the engine is lost."""

    def __init__(
        self, clients: Sequence[EngineClient], interval_seconds: float, timeout_seconds: float, states: EngineStates
    ) -> None:
        """Checks every `interval_seconds`; an engine that has passed no check for `timeout_seconds` is lost."""
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
        """Check an engine now; raises like `EngineClient.check_health`."""
        await self._clients[engine].check_health(self._timeout_seconds)

    def stop_watching(self, engine: int) -> None:
        for task, watched in list(self.monitors.items()):
            if watched == engine:
                task.cancel()
                del self.monitors[task]

    async def close(self) -> None:
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
