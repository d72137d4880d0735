"""Write a `torch_dist` checkpoint chunk by chunk, cut for a parallel layout.

Megatron's `dist_checkpointing.save` needs the whole sharded state in memory. Its format is that of
torch.distributed.checkpoint, which can be written one chunk at a time: every process appends its chunks to its own
files, and finally rank 0 writes `.metadata`, the index of all chunks, and the two small files that Megatron reads
first. Tests load the result with Megatron in several layouts.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter, metadata
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.storage import WriteResult

from megatron_dsrl.common.disk import writing
from megatron_dsrl.common.errors import UserError
from megatron_dsrl.config.layout import model_problems, process_problems, refuse
from megatron_dsrl.config.model import ParallelConfig
from megatron_dsrl.model.architecture import Architecture
from megatron_dsrl.weights.checkpoint_shapes import checkpoint_shape
from megatron_dsrl.weights.direct_write import DirectWriter
from megatron_dsrl.weights.layouts import Shape
from megatron_dsrl.weights.megatron_checkpoint import FORMAT_FILE, leading_index
from megatron_dsrl.weights.reused_memory import with_own_storage
from megatron_dsrl.weights.table import TableEntry, WeightTable

FILE_BYTES = 4 * 2**30
"""A new file is started once the current one has reached this size."""


@dataclass(frozen=True)
class CheckpointLayout:
    """Parallel sizes for cutting the chunks of a checkpoint.

    Any layout can load any checkpoint; in this one every process reads whole chunks. Only the tensor-parallel sizes
    matter for cutting: each layer and each expert is a separate chunk anyway, which is all that pipeline stages
    (virtual ones included) and expert parallelism need.
    """

    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    virtual_pipeline_parallel_size: int = 1
    expert_parallel_size: int = 1
    expert_tensor_parallel_size: int | None = None
    """None means the same as `tensor_parallel_size`."""

    def check(self, architecture: Architecture) -> None:
        """Raise UserError, which names the size, if the layout does not divide the model. Layers may be spread unevenly
        over pipeline stages."""
        cutting = ParallelConfig(
            tensor_parallel_size=self.tensor_parallel_size,
            expert_parallel_size=self.expert_parallel_size,
            expert_tensor_parallel_size=self.expert_tensor_parallel_size,
            sequence_parallel=self.tensor_parallel_size > 1,
        )
        staged = ParallelConfig(
            pipeline_parallel_size=self.pipeline_parallel_size,
            virtual_pipeline_stages=self.virtual_pipeline_parallel_size,
        )
        refuse([*process_problems(staged, staged.model_parallel_size), *model_problems(cutting, architecture.shape)])
        stages, layers = staged.pipeline_parallel_size * staged.virtual_pipeline_stages, architecture.num_hidden_layers
        if stages > layers:
            raise UserError(f"{stages} pipeline stages (including virtual ones) for a model with {layers} layers")

    def as_record(self) -> dict[str, int]:
        """All sizes by name."""
        return asdict(self) | {"expert_tensor_parallel_size": self.split_of_experts}

    @property
    def split_of_experts(self) -> int:
        """Number of parts that an expert's matrices are split into."""
        return self.expert_tensor_parallel_size or self.tensor_parallel_size


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
        self._writer = DirectWriter()
        self._files: list[_AppendedFile] = []
        self._files.append(self._next_file())

    def write(self, name: str, offsets: Shape, chunk: Tensor) -> None:
        """Append a chunk, in its shape in the checkpoint."""
        if self._files[-1].size >= FILE_BYTES:
            self._files.append(self._next_file())
        file = self._files[-1]
        position = file.size
        with writing(file.path):
            torch.save(with_own_storage(chunk), cast(BinaryIO, file))
        length = file.size - position
        self.written.append(WrittenChunk(name, offsets, tuple(chunk.shape), file.path.name, position, length))

    def _next_file(self) -> "_AppendedFile":
        path = self._folder / f"__{self._rank}_{len(self._files)}.distcp"
        with writing(path):
            path.touch()
            return _AppendedFile(path, self._writer)

    def __enter__(self) -> "ChunkWriter":
        return self

    def __exit__(self, *exception: Any) -> None:
        with writing(self._folder):
            self._writer.__exit__(*exception)


class _AppendedFile:
    """A new file that torch.save appends to."""

    def __init__(self, path: Path, writer: DirectWriter) -> None:
        self.path, self.size, self._file = path, 0, writer.open(path)
        self._writer = writer

    def write(self, data: memoryview) -> int:
        """Append bytes; returns their number."""
        self._writer.write(self._file, self.size, data)
        self.size += len(data)
        return len(data)

    def flush(self) -> None:
        """`ChunkWriter` flushes at the end."""


def cut_into_chunks(entry: TableEntry, whole: Tensor, layout: CheckpointLayout) -> Iterator[tuple[Shape, Tensor]]:
    """Cut an entry's whole parameter into chunks for a layout; yields (offsets in the checkpoint tensor, chunk)."""
    leading = leading_index(entry)
    stacked = (1,) * len(leading)
    cut = entry.rule.layout.cut(layout.split_of_experts if entry.rule.per_expert else layout.tensor_parallel_size)
    dim, pieces = cut or (0, 1)
    length = -(-whole.shape[dim] // pieces)
    for start in range(0, whole.shape[dim], length):
        piece = whole.narrow(dim, start, min(length, whole.shape[dim] - start))
        inner = tuple(start if i == dim else 0 for i in range(whole.dim()))
        yield leading + inner, piece.contiguous().view(stacked + tuple(piece.shape))


def write_metadata(folder: Path, table: WeightTable, dtype: torch.dtype, written: list[WrittenChunk]) -> None:
    """Write the metadata of the chunks of all processes. Call it in one process, at the end. Raises UserError if the
    disk is full or fails."""
    tensors = {
        rule.checkpoint_name: metadata.TensorStorageMetadata(
            metadata.TensorProperties(dtype=dtype), torch.Size(checkpoint_shape(rule, table)), chunks=[]
        )
        for rule in table.rules
    }
    results = []
    for chunk in written:
        offsets, chunks = torch.Size(chunk.offsets), tensors[chunk.name].chunks
        index = metadata.MetadataIndex(chunk.name, offsets, len(chunks))
        chunks.append(metadata.ChunkStorageMetadata(offsets, torch.Size(chunk.sizes)))
        results.append(WriteResult(index, chunk.length, _StorageInfo(chunk.file, chunk.position, chunk.length)))
    with writing(folder / ".metadata"):
        torch.save({"checkpoint_version": 3.0, "iteration": 0}, folder / "common.pt")
        (folder / FORMAT_FILE).write_text(json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1}))
        FileSystemWriter(folder).finish(metadata.Metadata({**tensors}, planner_data={}), [results])
