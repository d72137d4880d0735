"""Read one tensor that torch.save wrote into a section of a file, and compare it with its checksums.

The section is a ZIP archive with a CRC-32 of every part. torch.load ignores these and always allocates; here the values
are read straight into reused memory, and torch.load only reads what describes them.
"""

import io
import os
import pickle
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, cast
from zipfile import ZIP_STORED, BadZipFile, ZipFile, ZipInfo

import torch
from torch import Tensor

from megatron_dsrl.common.errors import UserError
from megatron_dsrl.weights.layouts import Shape
from megatron_dsrl.weights.reused_memory import ReusedMemory

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

LOCAL_HEADER_BYTES = 30
"""Fixed part of the header before each part of an archive; its last four bytes are the lengths of the name and of the
extra field that follow it."""

EDGE_BYTES = 4096
"""Bytes at either end of a section that are read at once; everything but the values usually fits."""


class FileSection(io.RawIOBase):
    """A section of a file as a file object."""

    def __init__(self, file: io.FileIO, start: int, length: int) -> None:
        """Start and length are in bytes."""
        self._file, self._start, self._length, self._position = file, start, length, 0
        # What describes the tensor is read in dozens of small steps.
        size = min(EDGE_BYTES, length)
        self._edges = [(at, os.pread(file.fileno(), size, start + at)) for at in (0, length - size)]

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._length}[whence]
        return self._position

    def readinto(self, buffer: "WriteableBuffer") -> int:
        view = memoryview(buffer)[: max(0, self._length - self._position)]
        for at, content in self._edges:
            if at <= self._position and self._position + len(view) <= at + len(content):
                view[:] = content[self._position - at : self._position - at + len(view)]
                self._position += len(view)
                return len(view)
        done = 0
        while done < len(view):
            count = os.preadv(self._file.fileno(), [view[done:]], self._start + self._position + done)
            if not count:
                break
            done += count
        self._position += done
        return done


def read_saved_tensor(section: FileSection, memory: ReusedMemory) -> Tensor:
    """The tensor, on CPU, in `memory`.

    Raises:
        BadZipFile: a checksum differs, or the section does not hold exactly one tensor of this byte order.
        OSError, RuntimeError, EOFError, ValueError, UnpicklingError: the section is damaged.
    """
    file = cast(IO[bytes], section)
    with ZipFile(file) as archive:
        values = _check_small_parts(archive)
    section.seek(0)
    described = torch.load(file, map_location="meta", weights_only=True)
    if not isinstance(described, Tensor):
        raise BadZipFile(f"it holds a {type(described).__name__} instead of a tensor")
    nbytes = described.untyped_storage().nbytes()
    if values.compress_type != ZIP_STORED or values.file_size != nbytes:
        raise BadZipFile(f"it has {values.file_size} bytes for a tensor of {nbytes}")
    stored = memory.take((nbytes // described.element_size(),), described.dtype)
    view = stored.view(torch.uint8).numpy().data
    _seek(section, values)
    if section.readinto(view) != nbytes:
        raise EOFError("it ends in the middle of the tensor")
    if values.CRC and zlib.crc32(view) != values.CRC:
        raise BadZipFile("its CRC-32 differs from the one that was stored with it")
    return stored.as_strided(described.size(), described.stride(), described.storage_offset())


def _check_small_parts(archive: ZipFile) -> ZipInfo:
    """Compare everything except the values with its checksum; returns the part with the values."""
    values = [part for part in archive.infolist() if "/data/" in part.filename]
    if len(values) != 1:
        raise BadZipFile(f"it holds {len(values)} tensors instead of one")
    for part in archive.infolist():
        if part is values[0] or part.CRC == 0:  # 0: `torch.serialization.set_crc32_options(False)`
            continue
        content = archive.read(part)  # compares
        if part.filename.endswith("/byteorder") and content.decode() != sys.byteorder:
            raise BadZipFile(f"it was written on a {content.decode()}-endian machine")
    return values[0]


def _seek(section: FileSection, part: ZipInfo) -> None:
    """Go to the first byte of a part's content."""
    header = bytearray(LOCAL_HEADER_BYTES)
    section.seek(part.header_offset)
    section.readinto(header)
    lengths = [int.from_bytes(header[start : start + 2], "little") for start in (26, 28)]
    section.seek(part.header_offset + LOCAL_HEADER_BYTES + sum(lengths))


@dataclass(frozen=True)
class Chunk:
    """A part of a tensor of a distributed checkpoint: a section of a file, in which torch.save wrote it."""

    offsets: Shape
    sizes: Shape
    file: str
    position: int
    length: int
    """Stored size in bytes."""


def read_chunk(folder: Path, name: str, chunk: Chunk, dtype: torch.dtype, memory: ReusedMemory) -> Tensor:
    """Read a chunk of the tensor with this name into `memory` and compare it with its CRC-32. Raises UserError if it is
    damaged, or does not have the expected dtype and shape."""
    path = folder / chunk.file
    try:
        with path.open("rb", buffering=0) as file:
            part = read_saved_tensor(FileSection(file, chunk.position, chunk.length), memory)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError, BadZipFile) as error:
        raise UserError(
            f"{path} is damaged: the chunk of {name} at {list(chunk.offsets)} cannot be read: {error}. Convert or "
            "copy the checkpoint again"
        ) from error
    if part.dtype != dtype or tuple(part.shape) != chunk.sizes:
        raise UserError(f"{path}: the chunk of {name} at {list(chunk.offsets)} does not match .metadata")
    return part
