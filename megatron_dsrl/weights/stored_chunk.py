"""Chunks of a distributed checkpoint: sections of files in which torch.save wrote a part of a tensor.

What torch.save writes is a ZIP archive with a CRC-32 of every part; torch.load ignores these, so they are checked here.
"""

import io
import os
import pickle
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, cast
from zipfile import BadZipFile, ZipFile

import torch
from torch import Tensor

from megatron_dsrl.common.errors import UserError
from megatron_dsrl.weights.layouts import Shape

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer


@dataclass(frozen=True)
class Chunk:
    """A stored part of a tensor."""

    offsets: Shape
    sizes: Shape
    file: str
    position: int
    length: int
    """Stored size in bytes."""


class _FileView(io.RawIOBase):
    """A section of a file as a file object, which `torch.load` reads directly into the tensor."""

    def __init__(self, file: io.FileIO, start: int, length: int) -> None:
        self._file, self._start, self._length, self._position = file, start, length, 0

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
        done = 0
        while done < len(view):
            count = os.preadv(self._file.fileno(), [view[done:]], self._start + self._position + done)
            if not count:
                break
            done += count
        self._position += done
        return done


def read_chunk(folder: Path, name: str, chunk: Chunk, dtype: torch.dtype) -> Tensor:
    """Read a chunk of the tensor with this name and compare it with its CRC-32.

    Raises:
        UserError: it is damaged, or does not have the expected dtype and shape.
    """
    path = folder / chunk.file
    try:
        with path.open("rb", buffering=0) as file:
            view = cast(IO[bytes], _FileView(file, chunk.position, chunk.length))
            part = torch.load(view, map_location="cpu", weights_only=True)
            _check_checksums(view, part)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError, BadZipFile) as error:
        raise UserError(
            f"{path} is damaged: the chunk of {name} at {list(chunk.offsets)} cannot be read: {error}. Convert or "
            "copy the checkpoint again"
        ) from error
    if part.dtype != dtype or tuple(part.shape) != chunk.sizes:
        raise UserError(f"{path}: the chunk of {name} at {list(chunk.offsets)} does not match .metadata")
    return part


def _check_checksums(file: IO[bytes], loaded: Tensor) -> None:
    """Compare what was loaded from a file of torch.save with the checksums in it.

    Raises:
        BadZipFile: they differ, or the file's directory is damaged.
    """
    with ZipFile(file) as archive:
        for part in archive.infolist():
            if part.CRC == 0:  # `torch.serialization.set_crc32_options(False)`
                continue
            if not part.filename.endswith("/data/0"):
                archive.read(part)  # compares
            elif zlib.crc32(_stored_bytes(loaded)) != part.CRC:
                raise BadZipFile("its CRC-32 differs from the one that was stored with it")


def _stored_bytes(tensor: Tensor) -> memoryview:
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()).numpy().data
