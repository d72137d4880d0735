"""Planned memory of a run, by hand."""

import json
from pathlib import Path

import pytest

from megatron_dsrl.config.load import load_config
from megatron_dsrl.config.run import RunConfig
from megatron_dsrl.model.architecture import Architecture, read_architecture
from megatron_dsrl.planning.memory import engine_memory, policy_memory
from megatron_dsrl.planning.parameters import active_per_token, parameters_of_projections
from tests.planning.test_parameters import qwen3_8b
from tests.support.tiny_run import REPOSITORY

EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 128, "norm_topk_prob": True}


def write_model(folder: Path, layers: int, with_experts: bool, vocab_size: int = 128) -> Architecture:
    config = {
        "architectures": ["Qwen3MoeForCausalLM" if with_experts else "Qwen3ForCausalLM"], "vocab_size": vocab_size,
        "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": layers, "num_attention_heads": 8,
        "num_key_value_heads": 4, "head_dim": 64, "rope_theta": 1e6, "max_position_embeddings": 4096,
        "tie_word_embeddings": True, **(EXPERTS if with_experts else {}),
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return read_architecture(folder)


def paper_run(*overrides: str) -> RunConfig:
    return load_config(REPOSITORY / "configs" / "dsrl_qwen3_8b.yaml", overrides)


def test_weights_gradients_and_optimizer_by_hand() -> None:
    """8.19e9 parameters in bfloat16, split over 4 processes; the optimizer's 12 bytes over 2 replicas as well."""
    split = ("parallel.tensor_parallel_size=4", "parallel.distributed_optimizer=true")
    memory = policy_memory(paper_run(*split), qwen3_8b(), world_size=8, stage=0)
    per_process = 8_190_735_360 / 4
    assert memory.weights == pytest.approx(2 * per_process, rel=1e-3)  # norms are not split
    assert memory.gradients == 2 * memory.weights
    assert memory.optimizer == 12 * (memory.weights // 2) // 2


def test_the_engines_cache_by_hand() -> None:
    """60 % of 80e9 bytes without the weights; a token takes 2 x 36 layers x 8 heads x 128 x 2 bytes."""
    memory = engine_memory(paper_run("engine.memory_fraction=0.6"), qwen3_8b(), gpu_bytes=80 * 10**9)
    assert memory.weights == 2 * 8_190_735_360
    assert memory.cache_tokens == (48 * 10**9 - memory.weights) // 147_456


def test_an_fp8_engine_has_a_byte_per_weight_of_its_projections_and_a_scale_per_block() -> None:
    memory = engine_memory(paper_run("engine.quantization=fp8"), qwen3_8b(), gpu_bytes=80 * 10**9)
    projections = 36 * (4096 * 128 * (2 * 32 + 2 * 8) + 3 * 4096 * 12288)
    assert parameters_of_projections(qwen3_8b()) == active_per_token(qwen3_8b()) == projections
    assert memory.weights == 2 * (8_190_735_360 - projections) + projections + 4 * projections // 128**2
