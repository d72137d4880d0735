"""The few numbers of an HF `config.json` that the checks before a run need. Reads no weights and imports no model."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_dsrl.errors import UserError


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a decoder-only transformer."""

    layers: int
    """Transformer blocks."""

    attention_heads: int
    """Query heads."""

    key_value_groups: int
    """Key/value heads (GQA); equal to `attention_heads` without GQA."""

    feed_forward_size: int
    """Inner size of the MLP."""

    context_tokens: int
    """Longest sequence that the positions were made for."""


_FIELDS = {
    "layers": "num_hidden_layers",
    "attention_heads": "num_attention_heads",
    "key_value_groups": "num_key_value_heads",
    "feed_forward_size": "intermediate_size",
    "context_tokens": "max_position_embeddings",
}


def read_model_shape(path: str) -> ModelShape:
    """Read the shape of `model.path`: a local folder, or a hub name (its config.json alone is then fetched).

    Raises UserError when there is no such model, or its config.json is damaged or lacks a number.
    """
    file = _find_config_json(path)
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"model.path: cannot read {file}: {error}") from error
    return ModelShape(**{name: _whole_number(values, key, file) for name, key in _FIELDS.items()})


def _whole_number(values: Any, key: str, file: Path) -> int:
    value = values.get(key) if isinstance(values, dict) else None
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"model.path: {file}: `{key}` must be a positive whole number, found {value!r}")
    return value


def _find_config_json(path: str) -> Path:
    folder = Path(path).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(f"model.path: {path} has no config.json; it must be an HF model folder")
        return folder / "config.json"
    if not _may_be_hub_name(path):
        raise UserError(f"model.path: there is no folder {path}; make or download the model first, or correct the path")
    return _download_config_json(path)


def _may_be_hub_name(path: str) -> bool:
    """`Qwen/Qwen3-8B` may be one; `./x`, `/x`, `a/b/c` and anything under an existing folder may not."""
    parts = path.split("/")
    return len(parts) == 2 and all(parts) and not path.startswith((".", "~")) and not Path(parts[0]).exists()


def _download_config_json(name: str) -> Path:
    """The cached or freshly fetched config.json of a hub model."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    cached = try_to_load_from_cache(name, "config.json")
    if isinstance(cached, str):
        return Path(cached)
    try:
        return Path(hf_hub_download(name, "config.json", etag_timeout=10))
    except Exception as error:  # the hub client raises many unrelated types for one meaning: not to be had
        raise UserError(
            f"model.path: {name} is no local folder, and it could not be fetched as a hub model "
            f"({type(error).__name__}); download it first, or give the path of a folder"
        ) from error
