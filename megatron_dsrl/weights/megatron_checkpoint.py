"""Read Megatron's distributed checkpoints (`torch_dist`) piece by piece, without a process group.

A checkpoint holds each parameter as one tensor stacked over layers and experts, with a name without layer and expert
numbers: `decoder.layers.mlp.linear_fc1.weight` is [layers, 2 x feed-forward, hidden]; an expert's weight starts with
[layers, experts]. It is stored in chunks of at most one layer (and expert), cut for the layout that wrote it;
`.metadata` gives the location of each chunk. Names and shapes are those of Megatron-core 0.19, the file format is that
of torch.distributed.checkpoint.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

from megatron_dsrl.common.errors import UserError
from megatron_dsrl.weights.layouts import Shape
from megatron_dsrl.weights.reused_memory import ReusedMemory
from megatron_dsrl.weights.saved_tensor import Chunk, read_chunk
from megatron_dsrl.weights.table import TableEntry
from megatron_dsrl.weights.untrusted_checkpoint import read_metadata

PARTS_OF_THE_MODEL = ("embedding.", "decoder.", "output_layer.")
FORMAT_FILE = "metadata.json"
"""The file by which Megatron recognises a distributed checkpoint."""
MEGATRON_LM_TRACKER = "latest_checkpointed_iteration.txt"
"""File in the folder above Megatron-LM's checkpoints."""


class MegatronCheckpoint:
    """Names, shapes, dtypes and tensors of a distributed checkpoint."""

    def __init__(self, folder: Path) -> None:
        """Read the metadata, not the tensors. Raises UserError if it is not a distributed checkpoint, its metadata
        cannot be read, or a file is missing."""
        if not is_megatron_checkpoint(folder):
            raise UserError(_what_it_is_instead(folder))
        self.folder = folder
        metadata = read_metadata(folder)
        self._tensors: dict[str, TensorStorageMetadata] = {
            name: stored
            for name, stored in metadata.state_dict_metadata.items()
            if isinstance(stored, TensorStorageMetadata) and name.startswith(PARTS_OF_THE_MODEL)
        }
        self._chunks = self._locate_chunks(metadata.storage_data)
        self._part_memory = ReusedMemory()

    def shapes(self) -> dict[str, Shape]:
        """Shapes of the stacked tensors, by checkpoint name."""
        return {name: tuple(stored.size) for name, stored in self._tensors.items()}

    def dtypes(self) -> dict[str, torch.dtype]:
        """Dtypes of the stacked tensors, by checkpoint name."""
        return {name: stored.properties.dtype for name, stored in self._tensors.items()}

    def read(self, entry: TableEntry, memory: ReusedMemory | None = None) -> tuple[Tensor, ...]:
        """The HF tensors of a table entry, in the checkpoint's dtype; in `memory` if given, otherwise in their own.
        Raises UserError if a chunk is damaged, or a part of the tensor is missing."""
        name, leading = entry.rule.checkpoint_name, leading_index(entry)
        stored = self._tensors[name]
        shape, dtype, memory = tuple(stored.size[len(leading) :]), stored.properties.dtype, memory or ReusedMemory()
        chunks = self._chunks.get((name, leading), ())
        if len(chunks) == 1 and chunks[0].sizes[len(leading) :] == shape:
            return entry.rule.layout.merge([read_chunk(self.folder, name, chunks[0], dtype, memory).view(shape)])
        whole = memory.take(shape, dtype)
        filled = 0
        for chunk in chunks:
            self._part_memory.free()
            part = read_chunk(self.folder, name, chunk, dtype, self._part_memory)
            place = tuple(
                slice(offset, offset + size)
                for offset, size in zip(chunk.offsets[len(leading) :], chunk.sizes[len(leading) :])
            )
            whole[place] = part.view(whole[place].shape)
            filled += part.numel()
        if filled != whole.numel():
            raise UserError(f"{self.folder}: a part of {name} at {list(leading)} is missing")
        return entry.rule.layout.merge([whole])

    def check_chunks(self, number: int, processes: int) -> None:
        """Read the share of process `number` of the chunks and compare them with their CRC-32. Not collective. Raises
        UserError if one is damaged."""
        whole = [(name, chunk) for name in sorted(self._tensors) for chunk in self._chunks.get((name, ()), ())]
        for name, chunk in whole[number::processes]:
            self._part_memory.free()
            read_chunk(self.folder, name, chunk, self._tensors[name].properties.dtype, self._part_memory)

    def _locate_chunks(self, storage: Mapping[MetadataIndex, Any]) -> dict[tuple[str, Shape], list[Chunk]]:
        """Chunks by name and leading indices. A chunk is listed under each prefix of up to two indices, since rules
        differ in how many they stack."""
        located: dict[tuple[str, Shape], list[Chunk]] = {}
        for name, stored in self._tensors.items():
            for part in stored.chunks:
                place = storage[MetadataIndex(name, part.offsets)]
                if not (self.folder / place.relative_path).exists():
                    raise UserError(f"{self.folder / place.relative_path} is missing, though .metadata names it")
                chunk = Chunk(tuple(part.offsets), tuple(part.sizes), place.relative_path, place.offset, place.length)
                for count in range(min(3, len(chunk.offsets))):
                    if chunk.sizes[:count] == (1,) * count:
                        located.setdefault((name, chunk.offsets[:count]), []).append(chunk)
        return located


def _what_it_is_instead(folder: Path) -> str:
    """The message for a folder that is not a distributed checkpoint."""
    iterations = sorted(path.name for path in folder.glob("iter_*") if is_megatron_checkpoint(path))
    if (folder / MEGATRON_LM_TRACKER).is_file() and iterations:
        return f"{folder} holds Megatron-LM's checkpoints by iteration; name one of them, such as {iterations[-1]}"
    if any(folder.glob("mp_rank_*")) or any(folder.glob("iter_*/mp_rank_*")):
        return (
            f"{folder} is a checkpoint in Megatron-LM's older format `torch`; only `torch_dist` is read. Megatron-LM "
            "converts it with --ckpt-convert-format torch_dist"
        )
    if (folder / "config.json").is_file() and any(folder.glob("*.safetensors")):
        return f"{folder} is an HF folder, not a Megatron checkpoint; `dsrl convert hf-to-megatron` converts it"
    return f"{folder} is not a Megatron distributed checkpoint (metadata.json is missing or invalid)"


def is_megatron_checkpoint(folder: Path) -> bool:
    """Whether a folder holds a distributed checkpoint. Needs no Megatron, whose import takes seconds."""
    try:
        content = json.loads((folder / FORMAT_FILE).read_bytes())
    except (OSError, ValueError):  # none, or that of another program
        return False
    return isinstance(content, dict) and "sharded_backend" in content


def leading_index(entry: TableEntry) -> Shape:
    """Index of the entry in the stacked dimensions: (), (layer,) or (layer, expert)."""
    return tuple(number for number in (entry.layer, entry.expert) if number is not None)
