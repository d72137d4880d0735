"""Temporary folders on disk for programs that are not isolated."""

import fcntl
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PREFIX = "dsrl-code-"
NEW_SECONDS = 60.0
"""A younger folder may be about to be locked by its owner."""


@contextmanager
def temporary_folder() -> Iterator[str]:
    """A new folder for the `with` block. Removes folders that killed processes have left, too."""
    for left in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with suppress(OSError):  # removed meanwhile, or in use
            _remove_stale(left)
    folder = tempfile.mkdtemp(prefix=PREFIX)
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield folder
    finally:
        _remove(folder)
        os.close(descriptor)


def _remove_stale(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        status = os.fstat(descriptor)
        if status.st_uid == os.geteuid() and time.time() - status.st_mtime > NEW_SECONDS:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove(str(folder))
    finally:
        os.close(descriptor)


def _remove(folder: str) -> None:
    """Remove a folder of any depth, even with unreadable folders in it."""
    for command in (["rm", "-rf", folder], ["chmod", "-R", "u+rwX", folder], ["rm", "-rf", folder]):
        subprocess.run(command, check=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        if not os.path.exists(folder):
            return
