"""Chunks of a distributed checkpoint: sections of files in which torch.save wrote a part of a tensor."""

import pickle
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import torch
from torch import Tensor

from megatron_dsrl.common.errors import UserError
from megatron_dsrl.weights.layouts import Shape
from megatron_dsrl.weights.reused_memory import ReusedMemory
from megatron_dsrl.weights.saved_tensor import FileSection, read_saved_tensor


@dataclass(frozen=True)
class Chunk:
    """A stored part of a tensor."""

    offsets: Shape
    sizes: Shape
    file: str
    position: int
    length: int
    """Stored size in bytes."""


def read_chunk(folder: Path, name: str, chunk: Chunk, dtype: torch.dtype, memory: ReusedMemory) -> Tensor:
    """Read a chunk of the tensor with this name into `memory` and compare it with its CRC-32.

    Raises:
        UserError: it is damaged, or does not have the expected dtype and shape.
    """
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
