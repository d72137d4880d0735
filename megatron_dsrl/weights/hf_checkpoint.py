"""The tensors of an HF folder: one safetensors file, or several with an index. Tensors are read on demand."""

import json
from pathlib import Path

import torch
from torch import Tensor

from megatron_dsrl.common.errors import UserError
from megatron_dsrl.weights.layouts import Shape
from megatron_dsrl.weights.reused_memory import ReusedMemory
from megatron_dsrl.weights.safetensors_file import StoredTensor, read_header, read_pieces, read_tensor

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
COMPUTED = "rotary_emb.inv_freq"
"""Buffers saved by old versions of Transformers; they are computed from the configuration."""


class NoWeights(UserError):
    """A folder has no weight files."""


class HfCheckpoint:
    """Names, shapes, dtypes and tensors of an HF folder's weights."""

    def __init__(self, folder: Path) -> None:
        """Raises UserError if weight files are missing, or the index is damaged or names a missing file."""
        self.folder = folder
        self._headers: dict[Path, dict[str, StoredTensor]] = {}
        self._files = self._read_index() if (folder / INDEX_FILE).exists() else self._read_single()
        self._refuse_two_sets()

    def names(self) -> set[str]:
        return set(self._files)

    def file_of(self, name: str) -> Path:
        """The file that contains a tensor."""
        return self._files[name]

    def shapes(self) -> dict[str, Shape]:
        """Shapes of all tensors, read from the file headers. Raises UserError if a file is damaged or truncated, or
        lacks a tensor that the index places in it."""
        return {name: self._stored(name).shape for name in self._files}

    def dtypes(self) -> dict[str, torch.dtype]:
        """Dtypes of all tensors; raises like `shapes`."""
        return {name: self._stored(name).dtype for name in self._files}

    def read(self, name: str, memory: ReusedMemory | None = None) -> Tensor:
        """A copy of one tensor, on CPU, in the file's dtype; in `memory` if given, otherwise in its own."""
        return read_tensor(self._files[name], self._stored(name), memory or ReusedMemory())

    def are_equal(self, one: str, other: str) -> bool:
        """Whether two tensors have the same shape and values, like `torch.equal`. Reads them piece by piece."""
        first, second = self._stored(one), self._stored(other)
        if first.shape != second.shape:
            return False
        return all(
            torch.equal(*map(torch.Tensor.double, pieces))
            for pieces in zip(read_pieces(self._files[one], first), read_pieces(self._files[other], second))
        )

    def _stored(self, name: str) -> StoredTensor:
        path = self._files[name]
        header = self._header(path)
        if name not in header:
            raise UserError(f"{path}: tensor {name} is missing, though {INDEX_FILE} places it there")
        return header[name]

    def _header(self, path: Path) -> dict[str, StoredTensor]:
        if path not in self._headers:
            self._headers[path] = read_header(path)
        return self._headers[path]

    def _read_single(self) -> dict[str, Path]:
        path = self.folder / SINGLE_FILE
        if not path.exists():
            raise NoWeights(_no_weights(self.folder))
        return dict.fromkeys((name for name in self._header(path) if not name.endswith(COMPUTED)), path)

    def _refuse_two_sets(self) -> None:
        """Transformers would read the single file and SGLang the indexed ones, so the folder is ambiguous."""
        single = self.folder / SINGLE_FILE
        if single.exists() and single not in self._files.values():
            raise UserError(
                f"{self.folder} holds two sets of weights: {SINGLE_FILE}, and the files that {INDEX_FILE} names. "
                "Remove the outdated one"
            )

    def _read_index(self) -> dict[str, Path]:
        index = self.folder / INDEX_FILE
        try:
            files = json.loads(index.read_bytes())["weight_map"]
            placed = {name: self.folder / file for name, file in files.items() if not name.endswith(COMPUTED)}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{index} cannot be read as a safetensors index: {error!r}") from error
        for path in sorted(set(placed.values())):
            if not path.exists():
                raise UserError(f"{path} is missing, though {INDEX_FILE} names it")
        return placed


def _no_weights(folder: Path) -> str:
    if any(folder.glob("pytorch_model*.bin")):
        return (
            f"{folder} holds its weights in pytorch_model.bin, which is not read because such files can run code. Save "
            "them as safetensors: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(another folder)"
        )
    single = folder / SINGLE_FILE
    if single.is_symlink():
        return f"{single} points to {single.resolve()}, which does not exist; download the model again"
    if any(folder.glob("model-*-of-*.safetensors")):
        return f"{folder} lacks {INDEX_FILE}, which says where its tensors are; download it"
    return f"{folder} holds no weights: neither {SINGLE_FILE} nor {INDEX_FILE}"


def torch_dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype in `config.json`, such as `bfloat16`."""
    return str(dtype).removeprefix("torch.")
