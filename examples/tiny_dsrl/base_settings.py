"""Settings of the tiny base model, and whether it already exists. Does not import torch."""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from examples.tiny_dsrl.arithmetic import Noise
from megatron_dsrl.common.errors import UserError

MADE_FROM = "made_from"

VOCAB_SIZE = 128
"""Embedding rows of the model; the tokenizer has fewer tokens, as Qwen3's has."""

DENSE = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 512,
    "initializer_range": 0.06,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": None,
    "dtype": "float32",
}
"""Qwen3 with about a million parameters."""

EXPERTS = DENSE | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 192,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "tie_word_embeddings": False,
}
"""Qwen3-MoE: the dense model's feed-forward layers divided among eight experts four times, two of them per token."""

MODELS = {"dense": (DENSE, ".cache/tiny_dsrl"), "experts": (EXPERTS, ".cache/tiny_dsrl_experts")}
"""Architecture and output folder by the name on the command line."""


@dataclass(frozen=True)
class Settings:
    """Everything that decides what is made."""

    architecture: Mapping[str, Any] = field(default_factory=lambda: DENSE)
    """The model's config.json, tokens left out."""
    seed: int = 1
    steps: int = 1300
    documents_per_step: int = 16
    learning_rate: float = 1.5e-3
    correct_part: float = 0.8
    """Part of the steps, the first ones, that see only correct solutions to questions."""
    unprompted: float = 0.2
    """Probability that a document of the later steps has no question."""
    noise: Noise = Noise(
        hasty=0.6,
        forgotten_operation=0.64,
        merged_step=0.6,
        carry=0.1,
        step=0.04,
        rambling=0.04,
        unboxed=0.06,
        wrong_box=0.03,
    )
    train_problems: int = 4000
    held_out_problems: int = 400

    @property
    def correct_steps(self) -> int:
        """Steps of the first stage."""
        return math.ceil(self.correct_part * self.steps)


def fingerprint(settings: Settings) -> str:
    """The settings and the source files of this folder, as one hash."""
    parts = [json.dumps(asdict(settings), sort_keys=True)]
    parts += [path.read_text(encoding="utf-8") for path in sorted(Path(__file__).parent.glob("*.py"))]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def is_made(output: Path, settings: Settings) -> bool:
    """Whether the folder holds what these settings make. Raises UserError for a folder that is something else."""
    if not output.exists():
        return False
    mark = output / MADE_FROM
    if not mark.is_file():
        raise UserError(f"--output: {output} exists and was not made by this program; remove it or choose another")
    return mark.read_text(encoding="utf-8").strip() == fingerprint(settings)
