"""Signals that ask a command to stop. The first raises an exception in the main thread, which cleans up; the second
ends the process at once, unless it belongs to the same request."""

import asyncio
import os
import signal
import threading
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn, TypeVar

from megatron_dsrl.common.lost_output import leave_terminal
from megatron_dsrl.common.process import launched_rank

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)

SAME_REQUEST_SECONDS = 0.5
"""A signal that follows another within this time belongs to the same request: SLURM sends it to every process of a job
step, and a launcher among them passes it on to its ranks."""

Value = TypeVar("Value")

_cancel: Callable[[KeyboardInterrupt], None] | None = None
"""Cancels the coroutine that the main thread runs in `run_interruptible`."""


@contextmanager
def handling_signals(numbers: Iterable[int], handle: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Handle these signals in the block, except ignored ones (nohup ignores SIGHUP). Main thread only.

    Handlers that the block itself has set stay.
    """
    handled = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, handle) for number in handled}
    try:
        yield
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) == handle:
                signal.signal(number, handler)


def interrupt(error: KeyboardInterrupt) -> None:
    """Called by a signal handler: interrupt the main thread with this exception."""
    if _cancel is None:
        raise error
    _cancel(error)


def run_interruptible(work: Coroutine[Any, Any, Value]) -> Value:
    """`asyncio.run`, but an interruption cancels `work` and is raised here afterwards.

    Raised inside the event loop, it would end any of the tasks, and asyncio would report that task with a traceback;
    or, in the callback of a weak reference, it would be lost.
    """
    if threading.current_thread() is not threading.main_thread():
        return asyncio.run(work)
    interruption: KeyboardInterrupt | None = None

    async def cancellable() -> Value:
        global _cancel
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None

        def cancel(error: KeyboardInterrupt) -> None:
            nonlocal interruption
            interruption = error
            loop.call_soon_threadsafe(task.cancel)  # wakes the loop

        _cancel = cancel
        try:
            return await work
        finally:
            _cancel = None

    try:
        result = asyncio.run(cancellable())
    except BaseException:
        if interruption is None:
            raise
        raise interruption from None  # not what the work raised when it was cancelled
    if interruption is not None:
        raise interruption
    return result


def end_at_next_signal() -> None:
    """From now on, a further request to stop ends this process at once. After an exception asyncio would report each of
    the thousands of requests that are being cancelled."""
    asked = time.monotonic()

    def end(number: int, frame: FrameType | None) -> None:
        if time.monotonic() - asked >= SAME_REQUEST_SECONDS:
            _end_now(number)

    for number in STOP_SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, end)


def _end_now(number: int) -> NoReturn:
    for other in STOP_SIGNALS:  # in case the line below waits for a full pipe
        signal.signal(other, signal.SIG_DFL)
    if number == signal.SIGHUP:
        leave_terminal()
    if launched_rank() == 0:
        os.write(2, f"dsrl: second signal ({signal.Signals(number).name}); exiting at once\n".encode())
    os._exit(128 + number)  # children die with their parent
