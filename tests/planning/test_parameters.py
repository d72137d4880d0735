"""Parameter counts against the models that Megatron builds, on every rank."""

import json
import tempfile
from pathlib import Path

import pytest
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_dsrl.config.model import ModelConfig, ParallelConfig
from megatron_dsrl.model.architecture import Architecture, read_architecture
from megatron_dsrl.model.build import build_model
from megatron_dsrl.model.parallel import destroy_parallel, parallel_layout
from megatron_dsrl.planning.parameters import active_per_token, parameters_of_model, parameters_of_stage
from tests.support.distributed import run_distributed
from tests.support.tiny_model import make_tiny_qwen2, make_tiny_qwen3, make_tiny_qwen3_moe

LAYOUTS = {
    "tensor": ParallelConfig(tensor_parallel_size=2, sequence_parallel=True),
    "pipeline": ParallelConfig(pipeline_parallel_size=2),
    "data": ParallelConfig(),
    "experts": ParallelConfig(expert_parallel_size=2),
    "experts, split": ParallelConfig(
        tensor_parallel_size=2, sequence_parallel=True, expert_parallel_size=1, expert_tensor_parallel_size=2
    ),
}


def count_and_plan(folders: dict, layouts: dict) -> dict[tuple[str, str], tuple[tuple[int, int], tuple[int, int]]]:
    """By model and layout: (dense, expert) parameters that this rank holds, and that the plan says."""
    counts = {}
    for model, folder in folders.items():
        architecture = read_architecture(folder)
        for layout, parallel in layouts.items():
            if "experts" in layout and architecture.experts is None:
                continue
            with parallel_layout(parallel, seed=1):
                (chunk,) = build_model(architecture, ModelConfig(path="", dtype="float32"), parallel)
                held = {True: 0, False: 0}
                for name, parameter in chunk.named_parameters():
                    held[".experts." in name] += parameter.numel()
                stage = parallel_state.get_pipeline_model_parallel_rank()
                planned = parameters_of_stage(architecture, parallel, stage)
                counts[model, layout] = (held[False], held[True]), (planned.dense, planned.expert)
    rank = dist.get_rank()
    destroy_parallel()
    return {(*key, rank): value for key, value in counts.items()}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("models")
    make_tiny_qwen3(folder / "tied", tied=True, vocab_size=127)
    make_tiny_qwen3(folder / "untied", tied=False, vocab_size=127)
    make_tiny_qwen2(folder / "biases")
    make_tiny_qwen3_moe(folder / "experts")
    return {name: folder / name for name in ("tied", "untied", "biases", "experts")}


def test_every_rank_holds_what_the_plan_says(folders):
    ranks = run_distributed(count_and_plan, 2, folders, LAYOUTS)
    assert len(ranks[0]) == 4 * 3 + 2
    for counts in ranks:
        for key, (held, planned) in counts.items():
            assert held == planned, key


def test_published_sizes():
    """The names of the models: 8.2B and 30.5B parameters, 3.3B of them active (of which the layers have 2.7B)."""
    assert parameters_of_model(qwen3_8b()) == 8_190_735_360
    moe = qwen3_30b_a3b()
    assert parameters_of_model(moe) == 30_532_122_624
    embeddings = 2 * moe.vocab_size * moe.hidden_size
    assert (active_per_token(moe) + embeddings) / 1e9 == pytest.approx(3.35, abs=0.01)


def qwen3_8b() -> Architecture:
    return published("Qwen3ForCausalLM", 4096, 36, 32, 8, intermediate_size=12288)


def qwen3_30b_a3b() -> Architecture:
    experts = {
        "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": True,
    }  # fmt: skip
    return published("Qwen3MoeForCausalLM", 2048, 48, 32, 4, intermediate_size=6144, **experts)


def published(name: str, hidden: int, layers: int, heads: int, groups: int, **fields: object) -> Architecture:
    """From the numbers of the published config.json."""
    config = {
        "architectures": [name], "vocab_size": 151936, "hidden_size": hidden, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": groups, "head_dim": 128, "rope_theta": 1e6,
        "max_position_embeddings": 40960, "tie_word_embeddings": False, **fields,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        return read_architecture(Path(folder))
