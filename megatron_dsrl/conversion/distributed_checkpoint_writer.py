"""Write a `torch_dist` checkpoint chunk by chunk.

Megatron's `dist_checkpointing.save` needs the whole sharded state in memory. Its format is that of
torch.distributed.checkpoint, which can be written one chunk at a time: every process appends its chunks to its own
files, and finally rank 0 writes `.metadata`, the index of all chunks, and the two small files that Megatron reads
first. Tests load the result with Megatron in several layouts.
"""

import os
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import WriteResult

from megatron_dsrl.common.disk import writing
from megatron_dsrl.conversion.layout import CheckpointLayout
from megatron_dsrl.weights.checkpoint_shapes import checkpoint_shape
from megatron_dsrl.weights.disk_flush import DiskFlush
from megatron_dsrl.weights.layouts import Shape
from megatron_dsrl.weights.megatron_checkpoint import leading_index
from megatron_dsrl.weights.reused_memory import with_own_storage
from megatron_dsrl.weights.table import TableEntry, WeightTable

FILE_BYTES = 4 * 2**30
"""A new file is started once the current one has reached this size."""


@dataclass(frozen=True)
class WrittenChunk:
    """Location of a chunk on disk."""

    name: str
    offsets: Shape
    sizes: Shape
    file: str
    position: int
    length: int


class ChunkWriter:
    """Writes one process's files of a checkpoint. A context manager: on exit everything written is on disk.

    Creating it, writing, or leaving it raises UserError if the disk is full or fails.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self.written: list[WrittenChunk] = []
        self._folder = folder
        self._rank = rank
        self._flush = DiskFlush()
        self._files: list[BinaryIO] = []
        self._files.append(self._next_file())

    def write(self, name: str, offsets: Shape, chunk: Tensor) -> None:
        """Append a chunk, in its shape in the checkpoint."""
        if self._files[-1].tell() >= FILE_BYTES:
            self._files.append(self._next_file())
        file = self._files[-1]
        position = file.tell()
        with writing(Path(file.name)):
            torch.save(with_own_storage(chunk), file)
            length = file.tell() - position
            self._flush.wrote(file.fileno(), length)
        self.written.append(WrittenChunk(name, offsets, tuple(chunk.shape), Path(file.name).name, position, length))

    def _next_file(self) -> BinaryIO:
        path = self._folder / f"__{self._rank}_{len(self._files)}.distcp"
        with writing(path):
            return path.open("wb")

    def __enter__(self) -> "ChunkWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # After an error, a failure to write the rest is of no interest and must not replace it.
        with writing(self._folder) if error is None else suppress(Exception), ExitStack() as files:
            for file in self._files:
                files.callback(file.close)  # writes what is left in the buffer
            self._flush.finish()
            for file in self._files if error is None else ():
                file.flush()
                os.fsync(file.fileno())


def cut_into_chunks(entry: TableEntry, whole: Tensor, layout: CheckpointLayout) -> Iterator[tuple[Shape, Tensor]]:
    """Cut an entry's whole parameter into chunks for a layout; yields (offsets in the checkpoint tensor, chunk)."""
    leading = leading_index(entry)
    stacked = (1,) * len(leading)
    cut = entry.rule.layout.cut(layout.num_shards(entry.rule))
    dim, pieces = cut or (0, 1)
    length = -(-whole.shape[dim] // pieces)
    for start in range(0, whole.shape[dim], length):
        piece = whole.narrow(dim, start, min(length, whole.shape[dim] - start))
        inner = tuple(start if i == dim else 0 for i in range(whole.dim()))
        yield leading + inner, piece.contiguous().view(stacked + tuple(piece.shape))


def write_metadata(folder: Path, table: WeightTable, dtype: torch.dtype, written: list[WrittenChunk]) -> None:
    """Write the metadata of the chunks of all processes. Call it in one process, at the end.

    Raises:
        UserError: the disk is full or fails.
    """
    tensors = {
        rule.checkpoint_name: TensorStorageMetadata(
            TensorProperties(dtype=dtype), torch.Size(checkpoint_shape(rule, table)), chunks=[]
        )
        for rule in table.rules
    }
    results = []
    for chunk in written:
        offsets, chunks = torch.Size(chunk.offsets), tensors[chunk.name].chunks
        index = MetadataIndex(chunk.name, offsets, len(chunks))
        chunks.append(ChunkStorageMetadata(offsets, torch.Size(chunk.sizes)))
        results.append(WriteResult(index, chunk.length, _StorageInfo(chunk.file, chunk.position, chunk.length)))
    with writing(folder / ".metadata"):
        torch.save({"checkpoint_version": 3.0, "iteration": 0}, folder / "common.pt")
        save_config(CheckpointingConfig(sharded_backend="torch_dist", sharded_backend_version=1), str(folder))
        FileSystemWriter(folder).finish(Metadata({**tensors}, planner_data={}), [results])
