"""Write an HF folder: its weights tensor by tensor, from one or several processes, and the files beside them."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_dsrl.common.disk import writing
from megatron_dsrl.common.tensor_bytes import bytes_of
from megatron_dsrl.weights.direct_write import DirectWriter
from megatron_dsrl.weights.hf_checkpoint import INDEX_FILE, SINGLE_FILE, torch_dtype_name
from megatron_dsrl.weights.layouts import Shape
from megatron_dsrl.weights.safetensors_file import StoredTensor, create_file

FILE_BYTES = 5 * 2**30
COMPANIONS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
)
"""Files copied unchanged. config.json is copied too, with the dtype of the new weights."""
ADAPTER_FOLDER = "adapter"
"""Folder of LoRA adapters within an export. It holds PEFT's two files."""
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class HfFiles:
    """The weight files of a folder, at full size, and the location of every tensor in them."""

    folder: Path
    places: Mapping[str, tuple[str, StoredTensor]]
    """File name and location in the file, by tensor name."""


def create_hf_files(folder: Path, shapes: Mapping[str, Shape], dtype: torch.dtype, file_bytes: int) -> HfFiles:
    """Create the files without content in an existing, empty folder, and the index for more than one file. Call it in
    one process. Raises UserError if one cannot be written.

    Args:
        shapes: shapes of all tensors, in file order.
        file_bytes: maximum size of a file; a single tensor may exceed it.
    """
    groups = _cut_into_files(shapes, dtype, file_bytes)
    places: dict[str, tuple[str, StoredTensor]] = {}
    for i, group in enumerate(groups):
        numbered = f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors"
        file = SINGLE_FILE if len(groups) == 1 else numbered
        with writing(folder / file):
            stored = create_file(folder / file, {name: (dtype, shapes[name]) for name in group})
        places |= {name: (file, stored[name]) for name in group}
    if len(groups) > 1:
        total = sum(stored.nbytes for _, stored in places.values())
        index = {"metadata": {"total_size": total}, "weight_map": {name: file for name, (file, _) in places.items()}}
        with writing(folder / INDEX_FILE):
            (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")
    return HfFiles(folder, places)


class HfWriter:
    """Fills the files of an HF folder tensor by tensor, in any order, from any number of processes.

    A context manager: on exit everything written is on disk. Writing or leaving it raises UserError if the disk is full
    or fails.
    """

    def __init__(self, files: HfFiles) -> None:
        self._folder = files.folder
        self._places = files.places
        names = {file for file, _ in files.places.values()}
        self._writer = DirectWriter()
        self._files = {name: self._writer.open(files.folder / name) for name in names}

    def write(self, name: str, tensor: Tensor) -> None:
        """Write a CPU tensor to its location."""
        file, stored = self._places[name]
        assert tensor.dtype == stored.dtype and tuple(tensor.shape) == stored.shape
        with writing(self._folder / file):
            contiguous = tensor.contiguous()
            self._writer.write(self._files[file], stored.offset, bytes_of(contiguous))

    def __enter__(self) -> "HfWriter":
        return self

    def __exit__(self, *exception: Any) -> None:
        with writing(self._folder):
            self._writer.__exit__(*exception)


def _cut_into_files(shapes: Mapping[str, Shape], dtype: torch.dtype, file_bytes: int) -> list[list[str]]:
    groups: list[list[str]] = []
    filled = 0
    for name, shape in shapes.items():
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        if not groups or filled + nbytes > file_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += nbytes
    return groups


def copy_companions(source: Path, folder: Path, dtype: torch.dtype) -> None:
    """Copy configuration, generation configuration, tokenizer and chat template to a folder with weights of `dtype`.
    Raises UserError if one cannot be written."""
    config = json.loads((source / "config.json").read_bytes())
    # Transformers wrote `torch_dtype` up to version 4 and writes `dtype` since then; both read the older name.
    for field in {"dtype", "torch_dtype"} & set(config) or {"torch_dtype"}:
        config[field] = torch_dtype_name(dtype)
    with writing(folder / "config.json"):
        (folder / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    for path in {path for pattern in COMPANIONS for path in source.glob(pattern)}:
        if path.is_file():
            copy = folder / path.relative_to(source)
            with writing(copy):
                copy.parent.mkdir(exist_ok=True)
                shutil.copyfile(path, copy)


def is_template_folder(path: Path) -> bool:
    """Whether it is the folder of additional chat templates that Transformers writes, with nothing else in it."""
    return path.name == "additional_chat_templates" and all(file.suffix == ".jinja" for file in path.iterdir())
