"""LoRA: its update is PEFT's on the same adapters, in every layout; nothing else moves, and everything else sees merged
weights."""

import copy
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from megatron_dsrl.actor.actor import Actor
from megatron_dsrl.actor.build import build_actor
from megatron_dsrl.actor.reference import ReferencePolicy
from megatron_dsrl.config.actor import LoraConfig
from megatron_dsrl.config.model import ParallelConfig
from megatron_dsrl.config.run import RunConfig
from megatron_dsrl.model.architecture import read_architecture
from megatron_dsrl.model.parallel import destroy_parallel, parallel_layout
from megatron_dsrl.weights.load import fill
from megatron_dsrl.weights.peft import adapter_table
from megatron_dsrl.weights.stream import stream_hf_weights
from tests.actor.test_actor import GRPO, NSR_PRERL, OPTIMIZER, objective_of, reference
from tests.actor.test_layouts import DISTRIBUTED, INTERLEAVED, SEQUENCE_PARALLEL, Case, configuration, errors_of
from tests.actor.test_offload import go_away_and_come_back
from tests.actor.test_reference import log_probs
from tests.support.actors import flat, weights_of
from tests.support.distributed import run_distributed
from tests.support.plain_torch import adamw
from tests.support.tiny_model import make_tiny_qwen2, make_tiny_qwen3

LORA = LoraConfig(rank=4, alpha=6.0)
ATTENTION = LORA.model_copy(update={"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]})
SOME = LORA.model_copy(update={"target_modules": ["down_proj", "v_proj", "up_proj"]})
PEFT_PREFIX = "base_model.model."

ONE_PROCESS = {"1 process": Case(max_tokens=10_000), "MoE: 1 process": Case("MoE", max_tokens=10_000)}
TWO_PROCESSES = {
    "TP 2": Case(parallel={"tensor_parallel_size": 2}),
    "TP 2 with sequence parallelism, full recomputation": Case(parallel=SEQUENCE_PARALLEL, recompute="full"),
    "PP 2 x 2 virtual stages": Case(parallel=INTERLEAVED),
    "CP 2, distributed optimizer": Case(parallel={"context_parallel_size": 2} | DISTRIBUTED),
    "DP 2, distributed optimizer": Case(parallel=DISTRIBUTED),
    "MoE: TP 2 with sequence parallelism, EP 2, distributed optimizer": Case(
        "MoE", SEQUENCE_PARALLEL | DISTRIBUTED | {"expert_parallel_size": 2, "expert_tensor_parallel_size": 1}
    ),
}
CONTINUED = {
    "TP 2 with sequence parallelism, full recomputation": Case(),
    "CP 2, distributed optimizer": Case(parallel=DISTRIBUTED),
}
"""Checkpoints of two processes that one process continues."""


class PlainLora(nn.Module):
    """W x + alpha / rank * B A x. Its parameters have PEFT's names."""

    def __init__(self, linear: nn.Module, lora: LoraConfig, a: Tensor, b: Tensor) -> None:
        super().__init__()
        self.linear, self.scale = linear, lora.alpha / lora.rank
        self.lora_A, self.lora_B = nn.Linear(*a.T.shape, bias=False), nn.Linear(*b.T.shape, bias=False)
        self.lora_A.load_state_dict({"weight": a})
        self.lora_B.load_state_dict({"weight": b})

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.scale * self.lora_B(self.lora_A(x))


def plain_lora(model: PreTrainedModel, adapters: Mapping[str, Tensor], lora: LoraConfig) -> nn.Module:
    """The model of Transformers with adapters in plain torch."""
    model = copy.deepcopy(model).requires_grad_(False)
    for name, a in adapters.items():
        if name.endswith(".lora_A.weight"):
            path = name.removeprefix(PEFT_PREFIX).removesuffix(".lora_A.weight")
            adapted = PlainLora(model.get_submodule(path), lora, a, adapters[name.replace("lora_A", "lora_B")])
            model.set_submodule(path, adapted)
    return model


def adapters_of_torch(model: nn.Module) -> dict[str, Tensor]:
    """Adapters of a model of PEFT or `plain_lora`, by the names in PEFT's files."""
    named = {name.replace(".default.", "."): p.detach() for name, p in model.named_parameters() if "lora_" in name}
    return {PEFT_PREFIX + name.removeprefix(PEFT_PREFIX): parameter for name, parameter in named.items()}


def random_adapters(folder: Path, lora: LoraConfig) -> dict[str, Tensor]:
    """None of the matrices is zero, as B is before the first step."""
    generator = torch.Generator().manual_seed(5)
    shapes = adapter_table(read_architecture(folder), lora).hf_shapes()
    return {name: 0.1 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def build_with_random_adapters(config: RunConfig, folder: Path) -> Actor:
    actor = build_actor(config, folder)
    assert config.actor.lora
    table = adapter_table(read_architecture(folder), config.actor.lora)
    fill(actor.model.chunks, table, random_adapters(folder, config.actor.lora).__getitem__)
    return actor


def adapters_of(actor: Actor, folder: Path, lora: LoraConfig) -> dict[str, Tensor]:
    table = adapter_table(read_architecture(folder), lora)
    buckets = stream_hf_weights(actor.model.chunks, table, 10_000, torch.float32)
    return {name: matrix.clone() for bucket in buckets for name, matrix in bucket}


def lora_run(case: Case, folder: Path, lora: LoraConfig | None = None) -> RunConfig:
    """As the layouts' tests have it, with adapters; those of attention for a mixture of experts."""
    config = configuration(case, folder)
    lora = lora or (ATTENTION if case.model == "MoE" else LORA)
    return config.model_copy(update={"actor": config.actor.model_copy(update={"lora": lora})})


@pytest.fixture(scope="module")
def models(folder) -> Path:
    """Beside the dense model and the experts, a model with biases."""
    make_tiny_qwen2(folder / "biases", vocab_size=127)
    return folder


@pytest.mark.parametrize("made_by", ["plain torch", "PEFT"])
@pytest.mark.parametrize(
    ("model", "lora"),
    [("dense", LORA), ("dense", SOME), ("biases", LORA), ("MoE", ATTENTION)],
    ids=["every projection", "some projections", "biases", "experts"],
)
def test_an_update_is_that_of_peft_and_adamw(models, torch_distributed, tmp_path, made_by, model, lora) -> None:
    """Log-probs, loss, gradient norm, and every gradient element, seen through one step of a smooth Adam. What is
    exported is the same policy, merged and as PEFT's files."""
    peft = pytest.importorskip("peft", reason="bash tools/setup_cpu.sh --dev") if made_by == "PEFT" else None
    folder = models / model
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = lora_run(Case(model), models, lora).model_copy(update={"optimizer": OPTIMIZER})
    experience = objective_of(GRPO).experience
    with parallel_layout(config.parallel, seed=1):
        actor = build_with_random_adapters(config, folder)
        before, scores = weights_of(actor), torch.cat(actor.log_probs(experience))
        actor.export_hf(tmp_path / "export")
        update = actor.update([objective_of(GRPO)])
        adapters, after = adapters_of(actor, folder, lora), weights_of(actor)

    if peft:
        expected = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "export/adapter", is_trainable=True)
    else:
        expected = plain_lora(base, random_adapters(folder, lora), lora)
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "export", dtype=torch.float32)
        for same in (expected, merged):
            torch.testing.assert_close(scores, log_probs(same, experience), rtol=0, atol=1e-5)
    loss, grad_norm = reference(expected, GRPO)
    assert update.loss == pytest.approx(loss, rel=1e-5)
    assert update.grad_norm == pytest.approx(grad_norm, rel=1e-5)
    torch.nn.utils.clip_grad_norm_(expected.parameters(), OPTIMIZER.gradient_clip_norm)
    adamw(expected, OPTIMIZER).step()
    theirs = adapters_of_torch(expected)
    assert adapters.keys() == theirs.keys()
    for name, matrix in adapters.items():
        torch.testing.assert_close(matrix, theirs[name], rtol=0, atol=1.2e-7, msg=name)
    check_merged(before, base, random_adapters(folder, lora), lora)
    check_merged(after, base, adapters, lora)


def check_merged(
    streamed: Mapping[str, np.ndarray], base: PreTrainedModel, adapters: Mapping[str, Tensor], lora: LoraConfig
) -> None:
    """W + alpha / rank * B A where there is an adapter, elsewhere W bit for bit."""
    weights = base.state_dict()
    for name, weight in streamed.items():
        adapter = PEFT_PREFIX + name.removesuffix("weight")
        if f"{adapter}lora_A.weight" in adapters:
            product = adapters[f"{adapter}lora_B.weight"] @ adapters[f"{adapter}lora_A.weight"]
            merged = weights[name] + lora.alpha / lora.rank * product
            np.testing.assert_allclose(weight, merged.numpy(), rtol=0, atol=1e-6, err_msg=name)
            assert not np.array_equal(weight, weights[name].numpy())
        elif name in weights:  # not experts, which Transformers fuses
            assert np.array_equal(weight, weights[name].numpy()), name


def test_an_export_has_the_files_of_peft_in_a_folder(models, torch_distributed, tmp_path) -> None:
    config = lora_run(Case(), models, SOME)
    with parallel_layout(config.parallel, seed=1):
        build_with_random_adapters(config, models / "dense").export_hf(tmp_path / "export")
    folder = tmp_path / "export" / "adapter"
    assert not (tmp_path / "export" / "adapter_config.json").exists(), "Transformers would load that"
    assert {file.name for file in folder.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    assert len({file.stat().st_mode for file in folder.iterdir()}) == 1, "all files have the user's usual permissions"
    written, expected = load_file(folder / "adapter_model.safetensors"), random_adapters(models / "dense", SOME)
    assert written.keys() == expected.keys()
    assert all(torch.equal(matrix, expected[name]) for name, matrix in written.items())
    description = json.loads((folder / "adapter_config.json").read_text())
    assert (description["r"], description["lora_alpha"]) == (4, 6.0)
    assert description["target_modules"] == ["down_proj", "v_proj", "up_proj"]
    assert description["base_model_name_or_path"] == str((models / "dense").resolve())


def run_cases(folder: Path, checkpoints: Path, cases: Mapping[str, Case]) -> dict[str, dict]:
    """Three updates, and the last two again from a checkpoint that was saved after the first and written at the end."""
    results: dict[str, dict] = {}
    for name, case in cases.items():
        config, model, target = lora_run(case, folder), folder / case.model, checkpoints / name
        target.mkdir(exist_ok=True)
        with parallel_layout(config.parallel, seed=1):
            actor = build_with_random_adapters(config, model)
            scores = torch.cat(actor.log_probs(objective_of(GRPO).experience)).numpy()
            updates, weights = [flat(actor.update([objective_of(NSR_PRERL)]))], [weights_of(actor)]
            save = actor.model.start_save(target, copy=True)
            more = take_steps(actor)
            save.write()
            save.finish()
        with parallel_layout(config.parallel, seed=2):
            actor = build_actor(config, model)
            actor.model.load(target, same_layout=True)
            resumed = take_steps(actor)
        results[name] = {
            "log_probs": scores,
            "updates": updates + more["updates"],
            "weights": weights + more["weights"],
            "continued": more,
            "resumed": resumed,
        }
    destroy_parallel()
    return results


def take_steps(actor: Actor) -> dict:
    steps: dict = {"updates": [], "weights": []}
    for _ in range(2):
        steps["updates"].append(flat(actor.update([objective_of(GRPO)])))
        steps["weights"].append(weights_of(actor))
    return steps


def continue_alone(folder: Path, checkpoints: Path, cases: Mapping[str, Case]) -> dict[str, dict]:
    results = {}
    for name, case in cases.items():
        config = lora_run(case, folder)
        with parallel_layout(config.parallel, seed=3):
            actor = build_actor(config, folder / case.model)
            actor.model.load(checkpoints / name, same_layout=False)
            results[name] = take_steps(actor)
    destroy_parallel()
    return results


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def one_process(models, checkpoints) -> dict[str, dict]:
    return run_distributed(run_cases, 1, models, checkpoints, ONE_PROCESS)[0]


@pytest.fixture(scope="module")
def two_processes(models, checkpoints) -> dict[str, dict]:
    return run_distributed(run_cases, 2, models, checkpoints, TWO_PROCESSES, timeout_seconds=240)[0]


@pytest.mark.parametrize("name", TWO_PROCESSES)
def test_two_processes_are_one(one_process, two_processes, name) -> None:
    one, result = one_process["MoE: 1 process" if "MoE" in name else "1 process"], two_processes[name]
    np.testing.assert_allclose(result["log_probs"], one["log_probs"], rtol=0, atol=1e-5)
    errors = errors_of(result, one)
    assert max(errors.loss, errors.grad_norm, errors.parameters) < 1e-5, errors
    assert errors.metrics < 1e-4, errors


@pytest.mark.parametrize("name", [*ONE_PROCESS, *TWO_PROCESSES])
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(one_process, two_processes, name) -> None:
    result = (one_process | two_processes)[name]
    assert_bitwise(result["resumed"], result["continued"])


def test_another_layout_continues_within_rounding(models, checkpoints, two_processes) -> None:
    (alone,) = run_distributed(continue_alone, 1, models, checkpoints, CONTINUED)
    for name, steps in alone.items():
        errors = errors_of(steps, two_processes[name]["continued"])
        assert max(errors.loss, errors.grad_norm, errors.parameters) < 1e-5, (name, errors)


def test_checkpoints_have_adapters_only(checkpoints, one_process) -> None:
    """Two moments and a weight for each; the base would be 20 times as large."""
    stored = sum(file.stat().st_size for file in (checkpoints / "1 process").iterdir())
    base = sum(weight.nbytes for weight in one_process["1 process"]["weights"][0].values())
    assert stored < base


def test_offloading_changes_nothing(models, torch_distributed) -> None:
    results = []
    config = lora_run(Case(dtype="bfloat16", parallel=DISTRIBUTED), models)
    for offloads in (False, True):
        with parallel_layout(config.parallel, seed=1):
            actor = build_with_random_adapters(config, models / "dense")
            if offloads:
                moved = go_away_and_come_back(actor)
            first = take_steps(actor)
            if offloads:
                go_away_and_come_back(actor)
            results.append((first, take_steps(actor)))
    for one, other in zip(*results, strict=True):
        assert_bitwise(one, other)
    assert moved[0] < moved[3], "the gradients of adapters, 4 bytes each, against all weights of 2 bytes"


def assert_bitwise(one: dict, other: dict) -> None:
    assert one["updates"] == other["updates"]
    for weights, same in zip(one["weights"], other["weights"], strict=True):
        assert all(np.array_equal(weight, same[name]) for name, weight in weights.items())


def test_the_reference_is_the_model_without_adapters(models, torch_distributed, tmp_path) -> None:
    """Bit for bit, and it keeps the adapters' values only. Refreshed, it is the policy, even after a restart."""
    config, experience = lora_run(Case(dtype="bfloat16"), models), objective_of(GRPO).experience
    without = config.model_copy(update={"actor": config.actor.model_copy(update={"lora": None})})
    with parallel_layout(config.parallel, seed=1):
        base = build_actor(without, models / "dense").log_probs(experience)
        actor = build_actor(config, models / "dense")
        policy = ReferencePolicy(actor)
        assert all_equal(base, actor.log_probs(experience)), "B is zero"
        take_steps(actor)
        moved = weights_of(actor)
        assert not all_equal(base, actor.log_probs(experience))
        assert all_equal(base, policy.log_probs(experience))
        assert all(np.array_equal(weight, moved[name]) for name, weight in weights_of(actor).items())
        policy.refresh()
        refreshed = policy.log_probs(experience)
        assert all_equal(refreshed, actor.log_probs(experience))
        write = policy.start_save(tmp_path, copy=True)
        write.write()
        write.finish()
    with parallel_layout(config.parallel, seed=2):
        policy = ReferencePolicy(build_actor(config, models / "dense"))
        policy.load(tmp_path)
        assert all_equal(refreshed, policy.log_probs(experience))


def test_a_reference_with_a_different_model_has_no_adapters(models, torch_distributed, tmp_path) -> None:
    config, experience = lora_run(Case(), models), objective_of(GRPO).experience
    teacher = make_tiny_qwen3(tmp_path, tied=True, vocab_size=127, seed=2)
    with parallel_layout(ParallelConfig(), seed=1):
        actor = build_actor(config, models / "dense")
        reference_policy = ReferencePolicy(actor)
        reference_policy.load_model(tmp_path)
        first = weights_of(actor)
        take_steps(actor)
        scores = torch.cat(reference_policy.log_probs(experience))
    own = load_file(models / "dense" / "model.safetensors")
    assert np.array_equal(first["model.norm.weight"], own["model.norm.weight"]), "the policy is untouched"
    with torch.no_grad():
        torch.testing.assert_close(scores, log_probs(teacher, experience), rtol=0, atol=1e-5)


def all_equal(one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
