"""Processes that started this one, and exiting with them (Linux)."""

import ctypes
import os
import signal

PR_SET_PDEATHSIG = 1  # linux/prctl.h

LAUNCHER_VARIABLE = "DSRL_LAUNCHER"
"""Environment variable of the commands that `launch` and a sweep start: the process id of their starter."""


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
