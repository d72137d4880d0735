"""Size and CRC-32 of files, to detect that one was damaged after it was written, and a model's fingerprint."""

import hashlib
import mmap
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path

Checksums = dict[str, tuple[int, int]]
"""Size in bytes and CRC-32 by path relative to a folder."""
_READ_BYTES = 2**20
PIECES = 64
"""Number of pieces read from each weight file."""
PIECE_BYTES = 2**16


def checksums(folder: Path, files: Iterable[Path]) -> Checksums:
    """Read these files of a folder. Raises OSError if one is missing or unreadable."""
    return {str(file.relative_to(folder)): size_and_checksum(file) for file in files}


def size_and_checksum(file: Path) -> tuple[int, int]:
    """Size in bytes and CRC-32. Raises OSError if the file is missing or unreadable."""
    size = checksum = 0
    # One buffer outside the C library's heap: a process never gives back what a thread's heap has held, and every save
    # of a checkpoint has its own thread.
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


def fingerprint(folder: Path) -> str:
    """SHA-256 over the configuration of an HF folder or Megatron checkpoint, and the sizes and evenly spaced pieces of
    its weight files.

    Between nearby training steps in bf16 most weights do not change, and embeddings of rare tokens, at the beginning of
    the files, hardly ever do. Therefore many pieces are read.
    """
    digest = hashlib.sha256()
    for file in (folder / "config.json", folder / ".metadata"):
        digest.update(file.read_bytes() if file.is_file() else b"")
    for file in sorted([*folder.glob("*.safetensors"), *folder.glob("*.distcp")]):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as stream:
            for piece in range(PIECES):
                stream.seek(max(0, size - PIECE_BYTES) * piece // (PIECES - 1))
                digest.update(stream.read(PIECE_BYTES))
    return digest.hexdigest()
