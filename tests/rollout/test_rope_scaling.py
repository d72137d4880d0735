"""A run over models with scaled RoPE: engine and trainer give the same log-probs beyond the original context length."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from examples.tiny_dsrl.tokenizer import VOCAB_SIZE
from tests.support.llama_tokenizer import build_llama_tokenizer
from tests.support.tiny_run import dsrl, write_tiny_run

ORIGINAL_TOKENS = 16
"""Prompts alone have as many."""
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
    "initializer_range": 0.08,
}
SCALED = {"rope_theta": 1e4, "factor": 16.0, "original_max_position_embeddings": ORIGINAL_TOKENS}


def model_with(rope_type: str) -> PreTrainedModel:
    torch.manual_seed(0)
    if rope_type == "yarn":
        return Qwen3ForCausalLM(Qwen3Config(**SIZES, rope_parameters=SCALED | {"rope_type": "yarn"}))
    bounds = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    return LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters=SCALED | bounds))


@pytest.mark.slow
@pytest.mark.parametrize("rope_type", ["yarn", "llama3"])
def test_engine_and_trainer_agree(tmp_path: Path, rope_type: str) -> None:
    """In the second step, after a weight push; the first one trains in the pre-train space, which engines never see.
    The Llama has a tokenizer without `<|im_start|>`, and its own BOS in that space."""
    config = write_tiny_run(tmp_path, model_with(rope_type))
    if rope_type == "llama3":
        build_llama_tokenizer().save_pretrained(tmp_path / "model")
    completed = dsrl("train", str(config), timeout_seconds=600)
    assert completed.returncode == 0, completed.stderr
    run = tmp_path / "runs" / "tiny"
    _, second = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert second["response/mean_tokens"] > 8  # with their prompts, longer than the original context
    assert second["mismatch/max_log_prob_gap"] < 1e-4
    exported = json.loads((run / "hf" / "step_000002" / "config.json").read_text())
    assert exported["rope_parameters"]["rope_type"] == rope_type
