"""Tiny models of every supported family, by name. Transformers is imported only when one is made: processes that only
read the folders start faster without it."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any


def _make(function: str, folder: Path, **options: Any) -> Any:
    from tests.support import tiny_model

    return getattr(tiny_model, function)(folder, **options)


FAMILIES: Mapping[str, Callable[..., Any]] = {
    "Qwen3 tied": partial(_make, "make_tiny_qwen3", tied=True),
    "Qwen3 untied": partial(_make, "make_tiny_qwen3", tied=False),
    "Qwen3 YaRN": partial(_make, "make_tiny_qwen3_yarn", tied=True),
    "Qwen3-MoE": partial(_make, "make_tiny_qwen3_moe"),
    "Qwen2.5": partial(_make, "make_tiny_qwen2"),
    "Llama untied": partial(_make, "make_tiny_llama", tied=False),
    "Llama 3": partial(_make, "make_tiny_llama3"),
}
"""Each takes a folder, and `vocab_size`, `dtype`, `max_shard_size` and `seed` by name; returns Transformers' model."""
