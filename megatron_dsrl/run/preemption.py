"""Requests to stop from outside: SIGTERM and SIGUSR1, as SLURM and torchrun send them before they end a job.

The first request ends generation or evaluation at once, lets a running update come to its end, and then a checkpoint
is saved. A second one ends the process where it stands.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType

PREEMPTED_STATUS = 75
"""Exit status of a run that was asked to stop and can be continued (EX_TEMPFAIL of sysexits.h)."""

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequested(KeyboardInterrupt):
    """Raised inside `StopSignal.interruptible` when the process is asked to stop.

    A KeyboardInterrupt, because asyncio passes on that one even from its callbacks.
    """


class Preempted(SystemExit):
    """The run has stopped as asked, and its state is saved."""

    def __init__(self) -> None:
        super().__init__(PREEMPTED_STATUS)


class StopSignal:
    """Notes requests to stop while it is entered. Main thread only."""

    def __init__(self) -> None:
        self.requested = False
        self._interruptible = False
        self._handlers_before: dict[int, object] = {}

    def __enter__(self) -> "StopSignal":
        for number in SIGNALS:
            self._handlers_before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._handlers_before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """A request ends the block with StopRequested; one that came before it does so at once."""
        self._interruptible = True
        try:
            if self.requested:
                raise StopRequested
            yield
        finally:
            self._interruptible = False

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Inside an interruptible block: a request waits for the end of this part of it."""
        interruptible, self._interruptible = self._interruptible, False
        try:
            yield
        finally:
            self._interruptible = interruptible
        if interruptible and self.requested:
            raise StopRequested

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise SystemExit(128 + number)
        self.requested = True
        if self._interruptible:
            raise StopRequested
