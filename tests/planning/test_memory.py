"""Planned memory against what a real forward pass keeps, and the sums of a run by hand."""

import json
from pathlib import Path

import pytest
import torch

from megatron_dsrl.actor.forward_backward import MicroBatch, run_schedule
from megatron_dsrl.actor.packing import RowSplit, pack
from megatron_dsrl.algorithms.spaces import ScoredSequence
from megatron_dsrl.config.load import load_config
from megatron_dsrl.config.model import ModelConfig, ParallelConfig
from megatron_dsrl.config.run import RunConfig
from megatron_dsrl.model.architecture import Architecture, read_architecture
from megatron_dsrl.model.build import build_model
from megatron_dsrl.model.parallel import destroy_parallel, parallel_layout
from megatron_dsrl.planning.memory import engine_memory, layer_bytes_per_token, policy_memory
from tests.planning.test_parameters import qwen3_8b
from tests.support.distributed import run_distributed
from tests.support.tiny_run import REPOSITORY

EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 128, "norm_topk_prob": True}


def write_model(folder: Path, layers: int, with_experts: bool) -> Architecture:
    config = {
        "architectures": ["Qwen3MoeForCausalLM" if with_experts else "Qwen3ForCausalLM"], "vocab_size": 128,
        "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": layers, "num_attention_heads": 8,
        "num_key_value_heads": 4, "head_dim": 64, "rope_theta": 1e6, "max_position_embeddings": 4096,
        "tie_word_embeddings": True, **(EXPERTS if with_experts else {}),
    }  # fmt: skip
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return read_architecture(folder)


def bytes_kept_per_token(architecture: Architecture, recompute: str) -> float:
    """Of all storages that autograd holds after the forward pass of a packed row, parameters left out."""
    model = ModelConfig(path="", dtype="float32", recompute=recompute)
    (chunk,) = build_model(architecture, model, ParallelConfig())
    for parameter in chunk.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    row = pack([ScoredSequence(tuple(range(100)) * 4, 10)] * 2, [0, 1], RowSplit(), torch.device("cpu"))
    parameters = {parameter.untyped_storage().data_ptr() for parameter in chunk.parameters()}
    storages: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    kept = []

    def measure(output: torch.Tensor) -> tuple[torch.Tensor, None]:
        kept.append(sum(each.nbytes() for pointer, each in storages.items() if pointer not in parameters))
        return output.sum(), None

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run_schedule([chunk.train()], [MicroBatch(row, measure)])
    return kept[0] / row.token_ids.shape[1]


def measured_per_layer(folder: Path) -> dict[tuple[bool, str], float]:
    """By experts and recomputation, from models of two and four layers."""
    measured = {}
    with parallel_layout(ParallelConfig(), seed=1):
        for experts in (False, True):
            for recompute in ("none", "full"):
                two, four = (bytes_kept_per_token(write_model(folder, n, experts), recompute) for n in (2, 4))
                measured[experts, recompute] = (four - two) / 2
    destroy_parallel()
    return measured


def test_activations_of_a_layer_are_those_that_a_forward_pass_keeps(tmp_path):
    """Within 5 % (rotation tables and the router's small tensors are not counted); one input where recomputed."""
    (measured,) = run_distributed(measured_per_layer, 1, tmp_path / "model")
    whole = ("parallel.tensor_parallel_size=1", "parallel.sequence_parallel=false")
    config = paper_run("model.dtype=float32", *whole)
    for experts in (False, True):
        planned = layer_bytes_per_token(write_model(tmp_path / "model", 2, experts), config)
        assert measured[experts, "none"] == pytest.approx(planned, rel=0.05)
        assert planned < measured[experts, "none"]
        assert measured[experts, "full"] == 256 * 4


def paper_run(*overrides: str) -> RunConfig:
    return load_config(REPOSITORY / "configs" / "dsrl_qwen3_8b.yaml", overrides)


def test_weights_gradients_and_optimizer_by_hand():
    """8.19e9 parameters in bfloat16, split over 4 processes; the optimizer's 12 bytes over 2 replicas as well."""
    split = ("parallel.tensor_parallel_size=4", "parallel.distributed_optimizer=true")
    memory = policy_memory(paper_run(*split), qwen3_8b(), world_size=8, stage=0)
    per_process = 8_190_735_360 / 4
    assert memory.weights == pytest.approx(2 * per_process, rel=1e-3)  # norms are not split
    assert memory.gradients == 2 * memory.weights
    assert memory.optimizer == 12 * (memory.weights // 2) // 2


def test_the_engines_cache_by_hand():
    """60 % of 80e9 bytes without the weights; a token takes 2 x 36 layers x 8 heads x 128 x 2 bytes."""
    memory = engine_memory(paper_run("engine.memory_fraction=0.6"), qwen3_8b(), gpu_bytes=80 * 10**9)
    assert memory.weights == 2 * 8_190_735_360
    assert memory.cache_tokens == (48 * 10**9 - memory.weights) // 147_456
