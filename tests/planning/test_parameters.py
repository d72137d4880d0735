"""Parameter counts against the models that Megatron builds, on every rank."""

import json
import tempfile
from pathlib import Path

import pytest
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_dsrl.actor.build import build_actor, build_critic
from megatron_dsrl.actor.optimizer import chained_optimizers
from megatron_dsrl.actor.sharded_model import TrainableModel
from megatron_dsrl.config.actor import LoraConfig
from megatron_dsrl.config.load import load_config
from megatron_dsrl.config.model import ModelConfig, ParallelConfig
from megatron_dsrl.config.run import RunConfig
from megatron_dsrl.model.architecture import Architecture, read_architecture
from megatron_dsrl.model.build import build_model, build_value_model
from megatron_dsrl.model.lora import add_adapters
from megatron_dsrl.model.parallel import destroy_parallel, parallel_layout
from megatron_dsrl.model.source import PUBLISHED
from megatron_dsrl.planning.memory import critic_memory, policy_memory
from megatron_dsrl.planning.parameters import (
    active_per_token,
    adapter_parameters_of_stage,
    parameters_of_critic_stage,
    parameters_of_model,
    parameters_of_stage,
)
from tests.support.distributed import run_distributed
from tests.support.tiny_model import make_tiny_llama, make_tiny_qwen2, make_tiny_qwen3, make_tiny_qwen3_moe
from tests.support.tiny_run import REPOSITORY

LAYOUTS = {
    "tensor": ParallelConfig(tensor_parallel_size=2, sequence_parallel=True),
    "pipeline": ParallelConfig(pipeline_parallel_size=2),
    "uneven pipeline": ParallelConfig(pipeline_parallel_size=2, layers_in_last_stage=1),
    "data": ParallelConfig(),
    "experts": ParallelConfig(expert_parallel_size=2),
    "experts, split": ParallelConfig(
        tensor_parallel_size=2, sequence_parallel=True, expert_parallel_size=1, expert_tensor_parallel_size=2
    ),
}
LORA = LoraConfig(rank=4)
KINDS = {"policy": (build_model, parameters_of_stage), "critic": (build_value_model, parameters_of_critic_stage)}


def measure(folders: dict, layouts: dict) -> tuple[dict, list]:
    """`count_and_plan`, and `allocated` with and without the distributed optimizer, in one start of the processes."""
    counts = count_and_plan(folders, layouts)
    sizes = [allocated(data_parallel_run(folders["untied"], sharded), folders["untied"]) for sharded in (True, False)]
    rank = dist.get_rank()
    destroy_parallel()
    return {(*key, rank): value for key, value in counts.items()}, sizes


def count_and_plan(folders: dict, layouts: dict) -> dict[tuple[str, str, str], tuple[tuple, tuple]]:
    """By model, kind and layout: (dense, expert) parameters that this rank holds, and that the plan says."""
    counts = {}
    for model, folder in folders.items():
        architecture = read_architecture(folder)
        for layout, parallel in layouts.items():
            if "experts" in layout and architecture.experts is None:
                continue
            with parallel_layout(parallel, seed=1):
                stage = parallel_state.get_pipeline_model_parallel_rank()
                for kind, (build, plan) in KINDS.items():
                    (chunk,) = build(architecture, ModelConfig(path="", dtype="float32"), parallel)
                    held = {True: 0, False: 0}
                    for name, parameter in chunk.named_parameters():
                        held[".experts." in name] += parameter.numel()
                    planned = plan(architecture, parallel, stage)
                    counts[model, kind, layout] = (held[False], held[True]), (planned.dense, planned.expert)
                    if kind == "policy":
                        add_adapters([chunk], architecture, LORA)
                        trained = sum(each.numel() for each in chunk.parameters() if each.requires_grad)
                        adapters = adapter_parameters_of_stage(architecture, parallel, stage, LORA)
                        counts[model, "adapters", layout] = (trained, 0), (adapters.dense, adapters.expert)
    return counts


def data_parallel_run(folder: Path, distributed_optimizer: bool, *overrides: str) -> RunConfig:
    """A run of whole models in bfloat16."""
    return load_config(
        REPOSITORY / "configs" / "dsrl_qwen3_8b.yaml",
        [
            f"model.path={folder}", "model.random_init=true", "parallel.tensor_parallel_size=1",
            "parallel.sequence_parallel=false", f"parallel.distributed_optimizer={str(distributed_optimizer).lower()}",
            *overrides,
        ],
    )  # fmt: skip


def allocated(config: RunConfig, folder: Path) -> list[tuple[int, int, int]]:
    """Bytes of parameters, gradient buffers and optimizer state, of policy and critic."""
    with parallel_layout(config.parallel, seed=1):
        models = [build_actor(config, folder).model, build_critic(config, folder, steps=1).model]
        return [(size_of_parameters(model), size_of_gradients(model), size_of_optimizer(model)) for model in models]


def size_of_parameters(model: TrainableModel) -> int:
    return sum(parameter.nbytes for chunk in model.chunks for parameter in chunk.parameters())


def size_of_gradients(model: TrainableModel) -> int:
    return sum(buffer.grad_data.nbytes for chunk in model.chunks for buffer in chunk.buffers)


def size_of_optimizer(model: TrainableModel) -> int:
    """Master weights and Adam's moments; step counts left out."""
    total = 0
    for part in chained_optimizers(model._optimizer):
        total += sum(master.nbytes for group in part.optimizer.param_groups for master in group["params"])
        moments = [state[name] for state in part.optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
        total += sum(moment.nbytes for moment in moments)
    return total


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("models")
    make_tiny_qwen3(folder / "tied", tied=True, vocab_size=127)
    make_tiny_qwen3(folder / "untied", tied=False, vocab_size=127)
    make_tiny_qwen2(folder / "biases")
    make_tiny_llama(folder / "llama", tied=True)
    make_tiny_qwen3_moe(folder / "experts")
    return {name: folder / name for name in ("tied", "untied", "biases", "llama", "experts")}


@pytest.fixture(scope="module")
def measured(folders) -> list[tuple[dict, list]]:
    """By rank."""
    return run_distributed(measure, 2, folders, LAYOUTS)


def test_every_rank_holds_what_the_plan_says(measured) -> None:
    ranks = [counts for counts, _ in measured]
    assert len(ranks[0]) == 3 * (5 * 4 + 2)
    for counts in ranks:
        for key, (held, planned) in counts.items():
            assert held == planned, key


def test_gradients_and_optimizer_are_what_megatron_allocates(measured, folders) -> None:
    """Policy and critic on two data-parallel processes. Megatron pads its gradient buffers and shards a little."""
    architecture = read_architecture(folders["untied"])
    for _, (with_shards, without_shards) in measured:
        for sharded, sizes in ((True, with_shards), (False, without_shards)):
            config = data_parallel_run(folders["untied"], sharded)
            for plan, (weights, gradients, optimizer) in zip((policy_memory, critic_memory), sizes, strict=True):
                memory = plan(config, architecture, world_size=2, stage=0)
                assert weights == memory.weights
                assert memory.gradients <= gradients <= memory.gradients * (1.02 if sharded else 1)
                assert optimizer == (pytest.approx(memory.optimizer, rel=0.02) if sharded else memory.optimizer)


def test_with_lora_gradients_and_optimizer_are_those_of_the_adapters(folders) -> None:
    overrides = ("actor.lora={rank: 4, alpha: 4}", "model.random_init=false")
    config = data_parallel_run(folders["untied"], False, *overrides)
    memory = policy_memory(config, read_architecture(folders["untied"]), world_size=1, stage=0)
    with parallel_layout(config.parallel, seed=1):
        model = build_actor(config, folders["untied"]).model
    destroy_parallel()
    assert size_of_parameters(model) == memory.weights > 5 * memory.trained
    assert (size_of_gradients(model), size_of_optimizer(model)) == (memory.gradients, memory.optimizer)


def test_published_sizes() -> None:
    """The names of the models: 8.2B and 30.5B parameters, 3.3B of them active (2.7B of these in the layers)."""
    assert parameters_of_model(qwen3_8b()) == 8_190_735_360
    moe = qwen3_30b_a3b()
    assert parameters_of_model(moe) == 30_532_122_624
    embeddings = 2 * moe.vocab_size * moe.hidden_size
    assert (active_per_token(moe) + embeddings) / 1e9 == pytest.approx(3.35, abs=0.01)


@pytest.mark.parametrize(
    ("name", "parameters", "without_embeddings"),
    [
        ("0.6B", 0.6, 0.44), ("1.7B", 1.7, 1.4), ("4B", 4.0, 3.6), ("8B", 8.2, 6.95), ("14B", 14.8, 13.2),
        ("32B", 32.8, 31.2), ("30B-A3B", 30.5, 29.9), ("235B-A22B", 235, 234),
    ],
)  # fmt: skip
def test_shipped_sizes_have_the_parameters_that_their_pages_name(name, parameters, without_embeddings) -> None:
    """In billions, from "Model Overview" of https://huggingface.co/Qwen/Qwen3-<name>."""
    architecture = read_architecture(PUBLISHED / "Qwen" / f"Qwen3-{name}")
    total = parameters_of_model(architecture)
    embeddings = (1 if architecture.tie_word_embeddings else 2) * architecture.vocab_size * architecture.hidden_size
    for counted, named in ((total, parameters), (total - embeddings, without_embeddings)):
        digits = len(str(named).partition(".")[2])
        assert round(counted / 1e9, digits) == named


def test_all_shipped_sizes_are_checked() -> None:
    assert len(list(PUBLISHED.glob("*/*/config.json"))) == 8


def qwen3_8b() -> Architecture:
    return read_architecture(PUBLISHED / "Qwen" / "Qwen3-8B")


def qwen3_30b_a3b() -> Architecture:
    return read_architecture(PUBLISHED / "Qwen" / "Qwen3-30B-A3B")


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
