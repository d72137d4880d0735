"""One command at a time in a folder.

Rank 0 holds a lock (flock) on a file in the folder while it runs. The kernel releases the lock when the process ends in
any way, so nothing needs to be cleaned up. The file stays and names the last holder.
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
"""Wait for a process on this host: one that was just killed keeps the lock until its memory is freed."""
WAIT_FOR_OTHER_HOST_SECONDS = 120.0
"""Wait for a process on another host: a file server takes a while to notice a lost host; NFS 4 releases its locks after
90 s."""
POLL_SECONDS = 0.2


@contextmanager
def locked(folder: Path, report: Callable[[str], None]) -> Iterator[None]:
    """Keep other commands out of the folder, created if it does not exist, during the `with` block. Collective.
    `report` is called on rank 0 with a message if the file system has no locks or another process holds the lock.
    Raises UserError, on every rank and with nothing changed, if another process holds the lock, or the folder is not
    writable."""
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
            report(f"{folder}: the file system has no locks ({error}); do not run a second command in this folder")
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error}") from error


def _wait_for_lock(file: TextIO, folder: Path, report: Callable[[str], None]) -> None:
    """Raises UserError if another process still holds it at the time limit, and OSError if the file system has no
    locks."""
    started = time.monotonic()
    reported = False
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
                f"{folder} is in use by {holder}, and two commands would overwrite each other's files; wait for it, "
                "stop it, or choose another folder"
            )
        if not reported:
            report(f"{folder} is in use by {holder}; waiting up to {limit:g} s for it to exit")
            reported = True
        time.sleep(POLL_SECONDS)
