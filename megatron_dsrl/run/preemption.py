"""Stop requests from outside: SIGTERM and SIGUSR1, which SLURM and torchrun send before they end a job, and SIGHUP,
which comes when the terminal is closed.

The first request ends generation or evaluation at once, lets a running update finish, and then saves a checkpoint. A
second one ends the process at once, unless everything is saved: srun sends one to the ranks that have not ended yet
when the first one has.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from megatron_dsrl.common.lost_output import leave_terminal
from megatron_dsrl.common.stop_signals import end_at_next_signal, handling_signals, interrupt

PREEMPTED_STATUS = 75
"""Exit status of a run that was asked to stop and can be continued (EX_TEMPFAIL of sysexits.h)."""

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


class StopRequested(KeyboardInterrupt):
    """Raised inside `StopSignal.interruptible` when the process is asked to stop."""


class Preempted(SystemExit):
    """The run has stopped as asked, and its state is saved."""

    def __init__(self) -> None:
        super().__init__(PREEMPTED_STATUS)


class StopSignal:
    """Context that catches stop requests. Main thread only."""

    def __init__(self) -> None:
        self.requested = False
        self._interruptible = False
        self._handling = handling_signals(SIGNALS, self._note)

    def __enter__(self) -> "StopSignal":
        self._handling.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: Any) -> None:
        self._handling.__exit__(kind, *exception)
        if kind is not None and issubclass(kind, Preempted):
            for number in SIGNALS:
                signal.signal(number, signal.SIG_IGN)

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """A request, even an earlier one, ends the block with StopRequested."""
        self._interruptible = True
        try:
            if self.requested:
                raise StopRequested
            yield
        finally:
            self._interruptible = False

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Part of an interruptible block that is not interrupted: requests take effect at its end."""
        interruptible, self._interruptible = self._interruptible, False
        try:
            yield
        finally:
            self._interruptible = interruptible
        if interruptible and self.requested:
            raise StopRequested

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            leave_terminal()
        end_at_next_signal()
        self.requested = True
        if self._interruptible:
            interrupt(StopRequested())
