"""Read Megatron's distributed checkpoints (`torch_dist`) piece by piece, without a process group.

A checkpoint holds each parameter as one tensor stacked over layers and experts, with a name without layer and expert
numbers: `decoder.layers.mlp.linear_fc1.weight` is [layers, 2 x feed-forward, hidden]; an expert's weight starts with
[layers, experts]. It is stored in chunks of at most one layer (and expert), cut for the layout that wrote it;
`.metadata` gives the location of each chunk. Names and shapes are those of Megatron-core 0.19, the file format is that
of torch.distributed.checkpoint. A chunk is what torch.save wrote, a ZIP archive with a CRC-32 of every part; torch.load
ignores these, so they are checked here.
"""

import io
import os
import pickle
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast
from zipfile import BadZipFile, ZipFile

import torch
from megatron.core.dist_checkpointing.core import check_is_distributed_checkpoint
from torch import Tensor
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

from megatron_dsrl.common.errors import UserError
from megatron_dsrl.weights.layouts import Shape, Vocabulary
from megatron_dsrl.weights.table import TableEntry, TensorRule, WeightTable
from megatron_dsrl.weights.untrusted_checkpoint import read_metadata

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

PARTS_OF_THE_MODEL = ("embedding.", "decoder.", "output_layer.")
MEGATRON_LM_TRACKER = "latest_checkpointed_iteration.txt"
"""File in the folder above Megatron-LM's checkpoints."""
LARGEST_PADDING = 1024
"""Limit on padding rows of a vocabulary; Megatron-LM pads to a multiple of 128 x tensor-parallel size."""


@dataclass(frozen=True)
class _Chunk:
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


class MegatronCheckpoint:
    """Names, shapes, dtypes and tensors of a distributed checkpoint."""

    def __init__(self, folder: Path) -> None:
        """Read the metadata, not the tensors.

        Raises:
            UserError: it is not a distributed checkpoint, its metadata cannot be read, or a file is missing.
        """
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

    def shapes(self) -> dict[str, Shape]:
        """Shapes of the stacked tensors, by checkpoint name."""
        return {name: tuple(stored.size) for name, stored in self._tensors.items()}

    def dtypes(self) -> dict[str, torch.dtype]:
        """Dtypes of the stacked tensors, by checkpoint name."""
        return {name: stored.properties.dtype for name, stored in self._tensors.items()}

    def read(self, entry: TableEntry) -> tuple[Tensor, ...]:
        """The HF tensors of a table entry, in the checkpoint's dtype.

        Raises:
            UserError: a chunk is damaged, or a part of the tensor is missing.
        """
        name, leading = entry.rule.checkpoint_name, leading_index(entry)
        stored = self._tensors[name]
        shape = tuple(stored.size[len(leading) :])
        chunks = self._chunks.get((name, leading), ())
        if len(chunks) == 1 and chunks[0].sizes[len(leading) :] == shape:
            return entry.rule.layout.merge([self._read_chunk(name, chunks[0], stored.properties.dtype).view(shape)])
        whole = torch.empty(shape, dtype=stored.properties.dtype)
        filled = 0
        for chunk in chunks:
            part = self._read_chunk(name, chunk, stored.properties.dtype)
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
        """Read this process's share of the chunks and compare them with their CRC-32. Not collective.

        Args:
            number: number of this process, from 0.
            processes: how many processes share the work.

        Raises:
            UserError: a chunk is damaged.
        """
        whole = [(name, chunk) for name in sorted(self._tensors) for chunk in self._chunks.get((name, ()), ())]
        for name, chunk in whole[number::processes]:
            self._read_chunk(name, chunk, self._tensors[name].properties.dtype)

    def _read_chunk(self, name: str, chunk: _Chunk, dtype: torch.dtype) -> Tensor:
        path = self.folder / chunk.file
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

    def _locate_chunks(self, storage: Mapping[MetadataIndex, Any]) -> dict[tuple[str, Shape], list[_Chunk]]:
        """Chunks by name and leading indices. A chunk is listed under each prefix of up to two indices, since rules
        differ in how many they stack."""
        located: dict[tuple[str, Shape], list[_Chunk]] = {}
        for name, stored in self._tensors.items():
            for part in stored.chunks:
                place = storage[MetadataIndex(name, part.offsets)]
                if not (self.folder / place.relative_path).exists():
                    raise UserError(f"{self.folder / place.relative_path} is missing, though .metadata names it")
                chunk = _Chunk(tuple(part.offsets), tuple(part.sizes), place.relative_path, place.offset, place.length)
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


def is_megatron_checkpoint(folder: Path) -> bool:
    """Whether a folder holds a distributed checkpoint."""
    try:
        return check_is_distributed_checkpoint(str(folder))
    except (ValueError, TypeError):  # metadata.json of another program
        return False


def leading_index(entry: TableEntry) -> Shape:
    """Index of the entry in the stacked dimensions: (), (layer,) or (layer, expert)."""
    return tuple(number for number in (entry.layer, entry.expert) if number is not None)


def checkpoint_shape(rule: TensorRule, table: WeightTable) -> Shape:
    """Shape of a rule's tensor in a checkpoint, without vocabulary padding."""
    stacked = ((table.num_layers,) if rule.per_layer else ()) + ((table.num_experts,) if rule.per_expert else ())
    return stacked + whole_shape(rule)


def whole_shape(rule: TensorRule) -> Shape:
    """Shape of one unsharded Megatron parameter."""
    with torch.device("meta"):
        return tuple(rule.layout.shard([torch.empty(tensor.shape) for tensor in rule.hf], 0, 1).shape)


def check_megatron_checkpoint(checkpoint: MegatronCheckpoint, table: WeightTable) -> None:
    """Compare names and shapes with the table. A padded vocabulary is accepted.

    Raises:
        UserError: names the first few differences.
    """
    shapes = checkpoint.shapes()
    expected = {rule.checkpoint_name: checkpoint_shape(rule, table) for rule in table.rules}
    padded = {rule.checkpoint_name for rule in table.rules if isinstance(rule.layout, Vocabulary)}
    refuse([name for name in expected if name not in shapes], "missing tensors", checkpoint.folder)
    refuse(
        [name for name in shapes if name not in expected and "_extra_state" not in name],
        "tensors that the model of config.json does not have",
        checkpoint.folder,
    )
    wrong = [
        f"{name} is {list(shapes[name])}, config.json asks for {list(shape)}"
        for name, shape in expected.items()
        if not _fits(shapes[name], shape, name in padded)
    ]
    refuse(wrong, "tensors of the wrong shape", checkpoint.folder)


def _fits(shape: Shape, expected: Shape, may_be_padded: bool) -> bool:
    if not may_be_padded:
        return shape == expected
    return shape[1:] == expected[1:] and expected[0] <= shape[0] < expected[0] + LARGEST_PADDING


def refuse(problems: list[str], kind: str, folder: Path) -> None:
    """Raise UserError for any problems; the message names the first few."""
    if problems:
        shown = "; ".join(problems[:4]) + (f"; and {len(problems) - 4} more" if len(problems) > 4 else "")
        raise UserError(f"{folder}: {kind}: {shown}")
