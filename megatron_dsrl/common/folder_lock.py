"""One command at a time in a folder.

Rank 0 locks (flock) a file in it for as long as it lives: the kernel lifts the lock when the process ends, whichever
way, so that nothing is left to clean up. The file stays, and says who has locked it last.
"""

import fcntl
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TextIO

from megatron_dsrl.common.collective import on_first
from megatron_dsrl.common.errors import UserError

LOCK_FILE = ".lock"
WAIT_SECONDS = 30.0
"""For a process on this host: one that was killed a moment ago has the lock until its memory is freed."""
WAIT_FOR_OTHER_HOST_SECONDS = 120.0
"""A file server notices only after a while that a host is gone: NFS 4 lifts its locks after 90 s."""
POLL_SECONDS = 0.2


@contextmanager
def locked(folder: Path, report: Callable[[str], None]) -> Iterator[None]:
    """Keep other commands out of the folder in the body of the `with`. Collective.

    Args:
        folder: made if need be.
        report: called on rank 0 with a line, where the file system has no locks or another process must be waited for.

    Raises:
        UserError: another process has locked it, or it cannot be written to. On every rank; nothing was changed.
    """
    with ExitStack() as until_the_end:
        on_first(lambda: _lock(folder, report, until_the_end))
        yield


def _lock(folder: Path, report: Callable[[str], None], until_the_end: ExitStack) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = until_the_end.enter_context(open(folder / LOCK_FILE, "a+", encoding="utf-8"))
        try:
            _wait_for_lock(file, folder, report)
        except OSError as error:
            report(f"{folder}: no locks here ({error}), so nothing keeps a second command out of this folder")
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error}") from error


def _wait_for_lock(file: TextIO, folder: Path, report: Callable[[str], None]) -> None:
    """
    Raises:
        UserError: another process goes on holding it.
        OSError: the file system has no locks.
    """
    started = time.monotonic()
    told = False
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            file.seek(0)
            holder = file.read() or "another process"
        limit = WAIT_SECONDS if holder.endswith(f" on {socket.gethostname()}") else WAIT_FOR_OTHER_HOST_SECONDS
        if time.monotonic() - started >= limit:
            raise UserError(
                f"{folder} is in use by {holder}, and two commands would spoil each other's files; let it end, end it, "
                "or name another folder"
            )
        if not told:
            report(f"{folder} is in use by {holder}; waiting {limit:g} s, should it be about to end")
            told = True
        time.sleep(POLL_SECONDS)
