"""A run over a model with YaRN: engine and trainer give the same log-probs beyond the original context length."""

import json
from pathlib import Path

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from examples.tiny_dsrl.tokenizer import VOCAB_SIZE
from tests.support.tiny_run import dsrl, write_tiny_run

ORIGINAL_TOKENS = 16
"""Prompts alone have as many."""


def model_with_yarn() -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.08,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 16.0,
            "original_max_position_embeddings": ORIGINAL_TOKENS,
        },
    )
    return Qwen3ForCausalLM(config)


@pytest.mark.slow
def test_engine_and_trainer_agree(tmp_path: Path):
    """In the second step, after a weight push; the first one trains in the pre-train space, which engines never see."""
    completed = dsrl("train", str(write_tiny_run(tmp_path, model_with_yarn())), timeout_seconds=600)
    assert completed.returncode == 0, completed.stderr
    run = tmp_path / "runs" / "tiny"
    _, second = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert second["response/mean_tokens"] > 8  # with their prompts, longer than the original context
    assert second["mismatch/max_log_prob_gap"] < 1e-4
    exported = json.loads((run / "hf" / "step_000002" / "config.json").read_text())
    assert exported["rope_parameters"]["rope_type"] == "yarn"
