"""Read and write safetensors files one tensor at a time.

The format (github.com/huggingface/safetensors): 8 bytes with the length of the header, little-endian; the header, a
JSON object of name -> dtype, shape and byte range; the bytes of the tensors. The safetensors library is not used
because it maps whole files into memory and needs all tensors of a file at once to write it, while a conversion must not
need memory for the whole model. In addition, several processes can fill one file here, each at its own offsets.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_dsrl.common.errors import UserError
from megatron_dsrl.common.hub import lfs_advice
from megatron_dsrl.weights.layouts import Shape
from megatron_dsrl.weights.reused_memory import ReusedMemory

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
PIECE_ELEMENTS = 8 * 2**20
_LENGTH_BYTES = 8
_LARGEST_HEADER = 100 * 2**20  # the library's own limit


@dataclass(frozen=True)
class StoredTensor:
    """Dtype, shape and location of a tensor in a file."""

    dtype: torch.dtype
    shape: Shape
    offset: int
    """Offset of its first byte from the start of the file."""

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a file by name. Raises UserError if it is not safetensors, or shorter than its header says."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
            if not 0 < length <= min(_LARGEST_HEADER, size - _LENGTH_BYTES):
                raise ValueError(f"the header length is {length} bytes in a file of {size} bytes; it may be truncated")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        start = _LENGTH_BYTES + length
        tensors = {name: _stored(entry, start) for name, entry in header.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} cannot be read as safetensors: {lfs_advice(path) or error}") from error
    end = max((tensor.offset + tensor.nbytes for tensor in tensors.values()), default=start)
    if size < end:
        raise UserError(
            f"{path} cannot be read: it is truncated, its header promises {end} bytes and it has {size}. "
            "Download or copy it again"
        )
    return tensors


def _stored(entry: Mapping, start: int) -> StoredTensor:
    first, last = entry["data_offsets"]
    tensor = StoredTensor(_DTYPES[entry["dtype"]], tuple(entry["shape"]), start + first)
    if last - first != tensor.nbytes:
        raise ValueError(f"{last - first} bytes do not hold {entry['dtype']} of shape {entry['shape']}")
    return tensor


def read_tensor(path: Path, stored: StoredTensor, memory: ReusedMemory) -> Tensor:
    """A copy of one tensor, in `memory`."""
    tensor = memory.take(stored.shape, stored.dtype)
    _read_elements(path, stored, 0, tensor.view(-1))
    return tensor


def read_pieces(path: Path, stored: StoredTensor) -> Iterator[Tensor]:
    """One tensor, flat, in pieces of `PIECE_ELEMENTS`."""
    elements = math.prod(stored.shape)
    for start in range(0, elements, PIECE_ELEMENTS):
        piece = torch.empty(min(PIECE_ELEMENTS, elements - start), dtype=stored.dtype)
        _read_elements(path, stored, start, piece)
        yield piece


def _read_elements(path: Path, stored: StoredTensor, start: int, flat: Tensor) -> None:
    """Fill a one-dimensional tensor with the elements from `start` on."""
    if len(flat):
        with path.open("rb", buffering=0) as file:
            file.seek(stored.offset + start * stored.dtype.itemsize)
            _read_into(file, flat.view(torch.uint8).numpy().data, path)


def _read_into(file: FileIO, view: memoryview, path: Path) -> None:
    done = 0
    while done < len(view):
        count = file.readinto(view[done:])  # one call reads at most 2 GiB
        if not count:
            raise UserError(f"{path} ended in the middle of a tensor; it was changed while being read")
        done += count


def create_file(path: Path, tensors: Mapping[str, tuple[torch.dtype, Shape]]) -> dict[str, StoredTensor]:
    """Create a file of its full size with a header but no content; returns the location of each tensor."""
    position = 0
    entries: dict[str, dict[str, Any]] = {}
    for name, (dtype, shape) in tensors.items():
        nbytes = math.prod(shape) * dtype.itemsize
        entries[name] = {
            "dtype": _DTYPE_NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [position, position + nbytes],
        }
        position += nbytes
    header = json.dumps({"__metadata__": {"format": "pt"}, **entries}, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # align tensors to 8 bytes
    start = _LENGTH_BYTES + len(header)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(_LENGTH_BYTES, "little") + header)
        file.truncate(start + position)
    return {
        name: StoredTensor(dtype, tuple(shape), start + entries[name]["data_offsets"][0])
        for name, (dtype, shape) in tensors.items()
    }
