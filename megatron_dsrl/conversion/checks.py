"""Checks made before a conversion writes anything."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_dsrl.common.errors import UserError
from megatron_dsrl.common.hub import lfs_advice
from megatron_dsrl.config.load import load_config
from megatron_dsrl.model.architecture import Architecture, read_architecture
from megatron_dsrl.model.source import resolve_model_folder
from megatron_dsrl.observability.records import CONFIG_FILE
from megatron_dsrl.weights.checkpoint_record import architecture_fields, refuse_drift
from megatron_dsrl.weights.hf_checkpoint import torch_dtype_name
from megatron_dsrl.weights.megatron_checkpoint import MEGATRON_LM_TRACKER, is_megatron_checkpoint


def common_dtype(dtypes: Mapping[str, torch.dtype], folder: Path) -> torch.dtype:
    """The common dtype of all tensors. Raises UserError if the dtypes differ or are not supported."""
    names: dict[torch.dtype, str] = {}
    for name, dtype in dtypes.items():
        names.setdefault(dtype, name)
    unusable = [dtype for dtype in names if dtype not in (torch.float32, torch.bfloat16, torch.float16)]
    if unusable:
        raise UserError(
            f"{folder}: {names[unusable[0]]} is stored as {torch_dtype_name(unusable[0])}; only float32, bfloat16 and "
            "float16 weights can be converted"
        )
    if len(names) > 1:
        found = ", ".join(f"{name} in {torch_dtype_name(dtype)}" for dtype, name in names.items())
        raise UserError(f"{folder} stores its weights in several dtypes ({found}); choose one with --dtype")
    return next(iter(names))


def read_companion_architecture(checkpoint: Path, companions: Path) -> Architecture:
    """The architecture of a Megatron checkpoint, from the config.json that belongs to it. Raises UserError if that is
    missing or refused; see `read_architecture`."""
    if companions == checkpoint and not (checkpoint / "config.json").exists():
        raise UserError(
            f"{checkpoint} has no config.json beside its weights; name the HF folder or hub model that it belongs to "
            "with --model"
        )
    return read_architecture(companions)


def check_tokenizer(folder: Path, architecture: Architecture) -> None:
    """Raise UserError for a tokenizer with ids outside the model's vocabulary, or that cannot be read. A folder without
    a tokenizer is accepted."""
    for name, read_ids in TOKEN_IDS.items():
        path = folder / name
        if not path.exists():
            continue
        try:
            ids = read_ids(json.loads(path.read_bytes()))
            token, number = max(ids.items(), key=lambda item: item[1], default=("", -1))
            too_large = number >= architecture.vocab_size
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} cannot be read: {lfs_advice(path) or repr(error)}") from error
        if too_large:
            raise UserError(
                f"{path} has token ids up to {number} ({token!r}), but vocab_size in config.json is "
                f"{architecture.vocab_size}. The tokenizer does not belong to this model"
            )


def _ids_of_fast_tokenizer(content: dict[str, Any]) -> dict[str, int]:
    vocabulary = content.get("model", {}).get("vocab", {})  # a list of pairs in models without merges
    ids = dict(vocabulary) if isinstance(vocabulary, dict) else {}
    return ids | {token["content"]: token["id"] for token in content.get("added_tokens", ())}


def _ids_of_tokenizer_config(content: dict[str, Any]) -> dict[str, int]:
    return {token["content"]: int(number) for number, token in content.get("added_tokens_decoder", {}).items()}


TOKEN_IDS: Mapping[str, Callable[[dict[str, Any]], dict[str, int]]] = {
    "tokenizer.json": _ids_of_fast_tokenizer,
    "vocab.json": dict,
    "added_tokens.json": dict,
    "tokenizer_config.json": _ids_of_tokenizer_config,
}
"""Tokenizer files with token ids, and a function to extract the ids from each."""


def check_expected(architecture: Architecture, folder: Path, expected: Path | None) -> None:
    """Compare the model with that of another folder, or with the one that a run's YAML trains (`--expect`). Raises
    UserError, which names every field that differs: RoPE base, tied embeddings, head dimension, norm epsilon, sizes."""
    if expected is None:
        return
    other = _expected_folder(expected)
    check_same_architecture(read_architecture(other), other, architecture, folder)


def check_same_architecture(expected: Architecture, its_folder: Path, found: Architecture, folder: Path) -> None:
    """Raise UserError if the models of two folders differ; it names every field that does."""
    files = (str(place / "config.json") for place in (its_folder, folder))
    refuse_drift(architecture_fields(expected), architecture_fields(found), *files)


def needed_for_conversion(source: Path, companions: Path, expected: Path | None) -> tuple[Path, ...]:
    """The paths that a conversion reads and must not replace."""
    return (source, companions, *((expected, _expected_folder(expected)) if expected is not None else ()))


def _expected_folder(expected: Path) -> Path:
    if expected.is_dir():
        return expected
    return resolve_model_folder(load_config(expected, []).model.path, f"--expect {expected}: model.path")


def check_is_hf(folder: Path) -> None:
    """Raise UserError, which says what it is, for a Megatron checkpoint or a run's folder. Called before
    anything reports the files that an HF folder would have as missing."""
    if (folder / CONFIG_FILE).is_file():
        raise UserError(
            f"{folder} is a run's folder; to convert its newest checkpoint, use `dsrl convert megatron-to-hf`"
        )
    if is_megatron_checkpoint(folder) or (folder / MEGATRON_LM_TRACKER).is_file():
        raise UserError(f"{folder} is a Megatron checkpoint, not an HF folder; use `dsrl convert megatron-to-hf`")
