"""What every batch that is being sampled knows of the engines: which are lost, busy, or receiving weights.

Several batches may run at the same time, in threads of their own: an evaluation beside asynchronous sampling.
"""

import threading
import time
from dataclasses import dataclass, field


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
        """The engine has got a call."""
        with self._lock:
            now = time.monotonic()
            self._begin = now if self._begin is None else self._begin
            self._running[engine] = self._running.get(engine, 0) + 1
            self._busy_since.setdefault(engine, now)

    def ended(self, engine: int) -> None:
        """A call of the engine has ended."""
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
