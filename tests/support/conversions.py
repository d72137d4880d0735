"""Conversions by `dsrl convert` in this process, and what tests change and compare in their folders."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_dsrl.cli import main

QUERY = "model.layers.1.self_attn.q_proj.weight"
VOCAB_SIZE = 101


def convert(direction: str, *arguments: object) -> int:
    """Run `dsrl convert` in this process; returns its exit status."""
    return main(["convert", direction, *map(str, arguments)])


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """All tensors of an HF folder's safetensors files, by name."""
    return {name: x for path in sorted(folder.glob("*.safetensors")) for name, x in load_file(path).items()}


def assert_identical(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """The same names, dtypes and values."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def hidden(folder: Path) -> list[str]:
    """Names of the hidden files and folders directly below the folder."""
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def everything_under(folder: Path) -> dict[str, bytes]:
    """Content of every file below the folder, by relative path."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def change_config(folder: Path, **changes: object) -> None:
    """Overwrite keys of the folder's config.json."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def change_weights(folder: Path, change) -> None:
    """Let `change` edit the tensors of model.safetensors in place."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
