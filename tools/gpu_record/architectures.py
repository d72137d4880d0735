"""Model folders without weights: the config.json of a published model, or of a tiny one."""

import json
import shutil
from pathlib import Path

from tools.gpu_record.machine import ROOT

TINY = "tiny"
PUBLISHED = ROOT / "megatron_dsrl" / "model" / "published"
TINY_ARCHITECTURE = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": 1024, "hidden_size": 128,
    "intermediate_size": 384, "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 4,
    "head_dim": 128, "max_position_embeddings": 8192, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
    "tie_word_embeddings": True, "initializer_range": 0.02,
}  # fmt: skip
"""Like the published models, it has a head size that GPU kernels support, and more token ids than the tokenizer of
examples/tiny_dsrl has tokens."""


def write_architecture(folder: Path, model: str) -> None:
    """Write the config.json of `TINY`, or of a published model such as `Qwen/Qwen3-0.6B`."""
    if model == TINY:
        (folder / "config.json").write_text(json.dumps(TINY_ARCHITECTURE))
    else:
        shutil.copy(PUBLISHED / model / "config.json", folder)
