"""Engines on CPU: large linear layers multiply with packed copies of their weights."""

import platform
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from megatron_dsrl.rollout.engine_rollout import EngineRollout
from tests.support.engine import numbered_prompts, started_rollout, tiny_run_config, transformers_log_probs

LARGE_LAYERS = 2 * 4 + 2
"""Four in each of two blocks, embedding and output layer."""


@pytest.fixture
def model(tmp_path: Path) -> Qwen2ForCausalLM:
    """Queries, keys and values have a bias, and the output layer has its own weights."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 320, "intermediate_size": 640, "num_hidden_layers": 2, "vocab_size": 512}
    heads = {"num_attention_heads": 10, "num_key_value_heads": 5}
    config = Qwen2Config(**sizes, **heads, max_position_embeddings=256, tie_word_embeddings=False)
    model = Qwen2ForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "model")
    return model


@pytest.fixture
def rollout(model, tmp_path) -> Iterator[EngineRollout]:
    config = tiny_run_config(tmp_path / "model", extra_arguments={"log_level": "info"})
    with started_rollout(config, tmp_path) as rollout:
        yield rollout


@pytest.mark.skipif(platform.machine() != "x86_64", reason="PyTorch packs weights on x86 only")
def test_log_probs_are_those_of_the_newest_weights(model, rollout, tmp_path) -> None:
    log = (tmp_path / "engines" / "engine_0.log").read_text()
    assert f"{LARGE_LAYERS} linear layers have packed weights" in log
    prompts = numbered_prompts(5)
    for seed in range(3):
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.03 * torch.randn_like(parameter))
        rollout.load_weights(lambda: [list(model.named_parameters())], rollout.weight_version + 1)

        groups = rollout.generate(prompts, 3, replace(rollout.training_sampling, stop_token_ids=()), "test")

        for group in groups:
            for sample in group.samples:
                reference = transformers_log_probs(model, group.prompt.token_ids, sample.response_ids, 1.0)
                torch.testing.assert_close(torch.tensor(sample.log_probs), reference, atol=2e-5, rtol=0)
