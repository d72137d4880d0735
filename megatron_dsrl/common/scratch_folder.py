"""Temporary folders of processes that may be killed: creating one removes those that killed processes left behind.

The owner of a folder holds a lock (flock) on it, which the kernel releases when the process ends in any way.
"""

import fcntl
import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

NEW_SECONDS = 60.0
"""A younger folder may be about to be locked by its owner."""


def only_the_folder(folder: Path) -> None:
    """The default for `before_removal`: nothing else to remove."""


class ScratchFolder:
    """A new folder. Its owner removes it."""

    def __init__(self, prefix: str, before_removal: Callable[[Path], None] = only_the_folder) -> None:
        """Also removes the folders of this kind that the user's killed processes left behind.

        Args:
            prefix: beginning of the folder's name, which only folders of this kind have.
            before_removal: called with a folder that was left behind, to remove what else belongs to it.
        """
        for left in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
            with suppress(OSError):  # removed meanwhile, or in use
                _remove_if_left(left, before_removal)
        self.path = Path(tempfile.mkdtemp(prefix=prefix))
        self._descriptor: int | None = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        with suppress(OSError):  # a file system without locks: then nobody else removes it either
            fcntl.flock(self._descriptor, fcntl.LOCK_EX)

    def remove(self) -> None:
        """May be called again, even after the folder is gone."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            _remove(self.path)
            os.close(descriptor)


def _remove_if_left(folder: Path, before_removal: Callable[[Path], None]) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        status = os.fstat(descriptor)
        if status.st_uid == os.geteuid() and time.time() - status.st_mtime > NEW_SECONDS:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            before_removal(folder)
            _remove(folder)
    finally:
        os.close(descriptor)


def _remove(folder: Path) -> None:
    """Remove a folder of any depth, even with unreadable folders in it."""
    for command in (["rm", "-rf"], ["chmod", "-R", "u+rwX"], ["rm", "-rf"]):
        subprocess.run([*command, folder], check=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        if not folder.exists():
            return
