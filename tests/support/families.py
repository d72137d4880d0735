"""Tiny models of every supported family, by name."""

from collections.abc import Callable, Mapping
from functools import partial

from tests.support.tiny_model import make_tiny_qwen2, make_tiny_qwen3, make_tiny_qwen3_moe
from transformers import PreTrainedModel

FAMILIES: Mapping[str, Callable[..., PreTrainedModel]] = {
    "Qwen3 tied": partial(make_tiny_qwen3, tied=True),
    "Qwen3 untied": partial(make_tiny_qwen3, tied=False),
    "Qwen3-MoE": make_tiny_qwen3_moe,
    "Qwen2.5": make_tiny_qwen2,
}
"""Each takes a folder, and `vocab_size`, `dtype`, `max_shard_size` and `seed` by name."""
