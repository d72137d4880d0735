"""Processes (Linux): children that cannot outlive their parent, daemon threads that do not delay its exit, signals, a
terminal that may be closed, and the folder of their sockets."""

import ctypes
import os
import select
import signal
import stat
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from types import FrameType
from typing import TypeVar

from megatron_dsrl.common.errors import UserError

PR_SET_PDEATHSIG = 1  # linux/prctl.h

LAUNCHER_VARIABLE = "DSRL_LAUNCHER"
"""Environment variable of the commands that `launch` and a sweep start: the process id of their starter."""

LONGEST_SOCKET_PATH = 107
"""Bytes; Linux's `sun_path` has 108, including the final zero."""
LONGEST_NAME = "/torch-shm-dir-xxxxxx/manager.sock"
"""The name that torch's shared memory uses; those of multiprocessing and SGLang are shorter."""


def launched_rank() -> int:
    """Rank that torchrun, srun or `--processes` gave this process; 0 without them. Needs no torch.distributed."""
    return int(os.environ.get("RANK", "0"))


def launched_world_size() -> int:
    """Number of processes that torchrun, srun or `--processes` started; 1 without them."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def end_with_launcher() -> None:
    """Have the kernel kill this process when the one that started it is killed: torchrun, the launcher of
    `--processes`, or a sweep.

    A launcher that exits stops its processes, but one that is killed cannot. They would keep running, alongside those
    of the next start in the same run folder.
    """
    launcher = os.environ.pop(LAUNCHER_VARIABLE, None)  # commands that this rank starts must not inherit it
    if launcher is not None:
        die_with_parent(int(launcher))
    elif "TORCHELASTIC_RUN_ID" in os.environ:
        die_with_parent(os.getppid())


def die_with_parent(parent: int) -> None:
    """Have the kernel send this process SIGKILL when its parent ends, `kill -9` of the parent included.

    "Parent" means the *thread* that started this process, so start children from a thread that stays alive. `parent` is
    its process id; if it has already ended, this process ends at once.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


Value = TypeVar("Value")


def in_background(work: Callable[[], Value]) -> "Future[Value]":
    """Start `work` in a daemon thread. Signal handlers still run while the future is awaited.

    Unlike the threads of a ThreadPoolExecutor, a daemon thread does not delay the exit of a process asked to stop.
    """

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    future: Future[Value] = Future()
    threading.Thread(target=run, daemon=True).start()
    return future


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


def leave_closed_pipe() -> bool:
    """Redirect standard output to /dev/null if it is a pipe that nobody reads any more; returns whether it is."""
    output = select.poll()
    output.register(1, 0)
    is_closed = bool(output.poll(0))  # POLLERR is reported without being asked for
    if is_closed:
        _redirect_to_nowhere(1)
    return is_closed


def leave_terminal() -> None:
    """Redirect standard output and error to /dev/null if they are a terminal, which may have been closed (SIGHUP).

    Writing to a closed terminal is an error, which would end the orderly stop of this process.
    """
    for descriptor in (1, 2):
        if stat.S_ISCHR(os.fstat(descriptor).st_mode):
            _redirect_to_nowhere(descriptor)


def _redirect_to_nowhere(descriptor: int) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)


def temporary_folder_problem() -> str | None:
    """What is wrong with the name of the temporary folder, and what to do; None if nothing is."""
    folder = tempfile.gettempdir()
    limit = LONGEST_SOCKET_PATH - len(LONGEST_NAME)
    length = len(os.fsencode(folder))
    if length <= limit:
        return None
    return (
        f"TMPDIR: {folder} has {length} bytes, but at most {limit} leave room for the names of the sockets that reward "
        "workers and engines need; set it to a shorter local folder, such as /tmp"
    )


def require_short_temporary_folder() -> None:
    """Raise UserError if the temporary folder's name is too long."""
    if problem := temporary_folder_problem():
        raise UserError(problem)
