"""Size and CRC-32 of files, to detect that one was damaged after it was written."""

import mmap
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path

Checksums = dict[str, tuple[int, int]]
"""Size in bytes and CRC-32 by path relative to a folder."""
_READ_BYTES = 2**20


def checksums(folder: Path, files: Iterable[Path]) -> Checksums:
    """Read these files of a folder.

    Raises:
        OSError: a file is missing or unreadable.
    """
    return {str(file.relative_to(folder)): size_and_checksum(file) for file in files}


def size_and_checksum(file: Path) -> tuple[int, int]:
    """Size in bytes and CRC-32.

    Raises:
        OSError: it is missing or unreadable.
    """
    size = checksum = 0
    # One buffer outside the C library's heap: what a thread's heap has held once stays with the process for good, and
    # every save of a checkpoint has its own thread.
    with open(file, "rb", buffering=0) as stream, mmap.mmap(-1, _READ_BYTES) as buffer, memoryview(buffer) as view:
        while count := stream.readinto(view):
            size += count
            checksum = zlib.crc32(view[:count], checksum)
    return size, checksum


def changed_file(folder: Path, expected: Mapping[str, tuple[int, int]], names: Iterable[str]) -> str | None:
    """The first of these files that is missing or has changed, in words; None if all are intact."""
    for name in names:
        try:
            found = size_and_checksum(folder / name)
        except OSError as error:
            return f"{name}: {error.strerror}"
        if found != tuple(expected[name]):
            return f"{name} has changed (size and CRC-32 are {found}, expected {tuple(expected[name])})"
    return None
