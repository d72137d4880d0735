"""The critic against plain Transformers and torch: values, updates with clipping, every layout in real processes.

Dense and with experts in float32, and both in bfloat16 as well.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    PreTrainedModel,
    Qwen3ForSequenceClassification,
    Qwen3ForTokenClassification,
    Qwen3MoeForTokenClassification,
)

from megatron_dsrl.actor.build import build_critic
from megatron_dsrl.algorithms.experience import Experience, Response, build_experience
from megatron_dsrl.algorithms.spaces import PostTrain
from megatron_dsrl.cli import main
from megatron_dsrl.config.actor import ActorConfig, CriticConfig, OptimizerConfig
from megatron_dsrl.config.data import DataConfig
from megatron_dsrl.config.model import ModelConfig, ParallelConfig, RouterConfig
from megatron_dsrl.config.run import RunConfig
from megatron_dsrl.model.parallel import destroy_parallel, parallel_layout
from tests.support.actors import weights_of
from tests.support.distributed import run_distributed
from tests.support.plain_torch import adamw
from tests.support.tiny_model import make_tiny_qwen3, make_tiny_qwen3_moe

OPTIMIZER = OptimizerConfig(
    learning_rate=3e-3,
    warmup_steps=2,
    eps=1e-2,  # with a tiny epsilon Adam's first steps are the sign of the gradient, which rounding can turn
    gradient_clip_norm=0.5,
)
POLICYS_ROUTER = RouterConfig(load_balancing="aux_loss", load_balancing_coefficient=1.0)
"""A critic has no such loss."""
VALUE_CLIP, MINI_BATCHES, EPOCHS = 0.05, 2, 2
SEQUENCE_PARALLEL = {"tensor_parallel_size": 2, "sequence_parallel": True}
VIRTUAL_STAGES = {"pipeline_parallel_size": 2, "virtual_pipeline_stages": 2}


@dataclass(frozen=True)
class Case:
    """One way of computing the updates."""

    model: str = "dense"
    parallel: dict[str, Any] = field(default_factory=dict)
    dtype: str = "float32"


ONE_PROCESS = {
    "one process": Case(),
    "MoE: one process": Case("MoE"),
    "bfloat16: one process": Case(dtype="bfloat16"),
    "MoE, bfloat16: one process": Case("MoE", dtype="bfloat16"),
}
TWO_PROCESSES = {
    "tensor parallel": Case(parallel={"tensor_parallel_size": 2}),
    "sequence parallel": Case(parallel=SEQUENCE_PARALLEL),
    "pipeline parallel": Case(parallel={"pipeline_parallel_size": 2}),
    "virtual pipeline stages": Case(parallel=VIRTUAL_STAGES),
    "data parallel": Case(),
    "distributed optimizer": Case(parallel={"distributed_optimizer": True}),
    "context parallel": Case(parallel={"context_parallel_size": 2}),
    "MoE: expert parallel, distributed optimizer": Case(
        "MoE", {"expert_parallel_size": 2, "distributed_optimizer": True}
    ),
    "MoE: sequence parallel, experts split too": Case("MoE", SEQUENCE_PARALLEL),
    "MoE: virtual pipeline stages": Case("MoE", VIRTUAL_STAGES),
    "bfloat16: virtual pipeline stages": Case(parallel=VIRTUAL_STAGES, dtype="bfloat16"),
}
CLASSIFIERS = {"token classifier": Qwen3ForTokenClassification, "classifier": Qwen3ForSequenceClassification}
OTHER_HEADS = ("untied policy", *CLASSIFIERS)
"""Models with their own output layer or a different head; the policy's is its embedding."""
TOKEN_CLASSIFIERS = {"dense": Qwen3ForTokenClassification, "MoE": Qwen3MoeForTokenClassification}


def run_config(folder: Path, parallel: ParallelConfig, path: str | None, dtype: str = "float32") -> RunConfig:
    return RunConfig(
        name="test",
        steps=4,
        model=ModelConfig(path=str(folder), dtype=dtype, router=POLICYS_ROUTER),
        parallel=parallel,
        actor=ActorConfig(max_tokens_per_micro_batch=100),
        critic=CriticConfig(
            path=path,
            value_clip=VALUE_CLIP,
            mini_batches_per_rollout=MINI_BATCHES,
            epochs_per_rollout=EPOCHS,
            optimizer=OPTIMIZER,
        ),
        data=DataConfig(source="unused"),
        phases=[{"name": "grpo", "space": {"name": "post_train"}, "advantage": {"name": "group_standardised"}}],
    )


def experience() -> Experience:
    """13 sequences of 1 to 17 scored tokens behind prompts of 3 to 7."""
    generator = torch.Generator().manual_seed(1)

    def tokens(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(127, (length,), generator=generator).tolist())

    lengths = [1 + (7 * number) % 17 for number in range(13)]
    batch = [Response(tokens(3 + n % 5), tokens(length), [-5.0] * length, 0.0, n) for n, length in enumerate(lengths)]
    return build_experience(batch, PostTrain(), [])


def with_returns(batch: Experience, values: tuple[torch.Tensor, ...]) -> Experience:
    """Returns on either side of the values, so that the clip cuts some tokens and not others."""
    generator = torch.Generator().manual_seed(2)
    returns = tuple(value + 0.3 * torch.randn(value.shape, generator=generator) for value in values)
    return replace(batch, values=values, returns=returns)


def run_cases(models: Path, cases: Mapping[str, Case]) -> dict[str, dict]:
    """Values, two updates on the same returns, and the weights then; from a critic's folder, in every layout."""
    results = {}
    for name, case in cases.items():
        folder, trained = models / case.model, models / f"{case.model} critic"
        parallel = ParallelConfig(**case.parallel)
        with parallel_layout(parallel, seed=1):
            critic = build_critic(run_config(folder, parallel, str(trained), case.dtype), folder, steps=4)
            values = critic.values(experience())
            batch = with_returns(experience(), values)
            updates = [critic.update(batch), critic.update(batch)]
            results[name] = {"values": torch.cat(values).numpy(), "updates": updates, "weights": weights_of(critic)}
    return results


def from_a_policy(folder: Path, paths: list[str | None]) -> list[tuple[float, dict[str, np.ndarray]]]:
    """Largest value and weights of a fresh critic, by what it starts from."""
    outcomes = []
    for path in paths:
        with parallel_layout(ParallelConfig(), seed=1):
            critic = build_critic(run_config(folder, ParallelConfig(), path), folder, steps=4)
            outcomes.append((torch.cat(critic.values(experience())).abs().max().item(), weights_of(critic)))
    return outcomes


def stop_and_continue(models: Path, target: Path) -> dict[str, bool]:
    """Whether a critic that was saved before its first step, and after two updates, continues bit for bit."""
    same = {}
    folder, trained = models / "dense", models / "dense critic"
    for name in ("tensor parallel", "distributed optimizer"):
        parallel = ParallelConfig(**TWO_PROCESSES[name].parallel)
        config = run_config(folder, parallel, str(trained))
        for updates in (0, 2):
            checkpoint = target / f"{name} {updates}"
            checkpoint.mkdir(exist_ok=True)
            with parallel_layout(parallel, seed=1):
                critic = build_critic(config, folder, steps=4)
                batch = with_returns(experience(), critic.values(experience()))
                for _ in range(updates):
                    critic.update(batch)
                write = critic.model.start_save(checkpoint, copy=False)
                write.write()
                write.finish()
                expected = (critic.update(batch), weights_of(critic))
            with parallel_layout(parallel, seed=2):
                critic = build_critic(config, folder, steps=4)
                critic.model.load(checkpoint, same_layout=True)
                actual = (critic.update(batch), weights_of(critic))
            same_weights = all(np.array_equal(actual[1][key], weight) for key, weight in expected[1].items())
            same[f"{name} after {updates}"] = actual[0] == expected[0] and same_weights
    return same


def in_one_process(models: Path, converted: Path) -> tuple[dict, list, list]:
    others = [str(models / name) for name in OTHER_HEADS]
    results = (
        run_cases(models, ONE_PROCESS),
        from_a_policy(models / "dense", [None, str(converted)]),
        from_a_policy(models / "dense", others),
    )
    destroy_parallel()
    return results


def in_two_processes(models: Path, target: Path) -> tuple[dict, dict]:
    results = run_cases(models, TWO_PROCESSES), stop_and_continue(models, target)
    destroy_parallel()
    return results


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """Folder of a dense policy and one with experts, and of critics that started from them; see `trained_critic`."""
    models = tmp_path_factory.mktemp("models")
    make_tiny_qwen3(models / "dense", tied=True, vocab_size=127)
    make_tiny_qwen3_moe(models / "MoE", vocab_size=127)
    make_tiny_qwen3(models / "untied policy", tied=False, vocab_size=127)
    for name, kind in CLASSIFIERS.items():
        kind.from_pretrained(models / "untied policy", num_labels=1).save_pretrained(models / name)
    for name in TOKEN_CLASSIFIERS:
        critic = _with_a_head(models, name).bfloat16().float()  # numbers that bfloat16 has too
        critic.save_pretrained(models / f"{name} critic")
    return models


def _with_a_head(models: Path, name: str) -> PreTrainedModel:
    model = TOKEN_CLASSIFIERS[name].from_pretrained(models / name, num_labels=1).float().eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        model.score.weight.copy_(0.1 * torch.randn(model.score.weight.shape, generator=generator))
        model.score.bias.fill_(0.25)
    return model


def trained_critic(models: Path, name: str) -> PreTrainedModel:
    """A critic with a head that is not zero, as Transformers reads it."""
    return TOKEN_CLASSIFIERS[name].from_pretrained(models / f"{name} critic").float().eval()


def weights_on_disk(model: PreTrainedModel, folder: Path) -> dict[str, torch.Tensor]:
    """By their names in checkpoints, where every expert has its own; in memory some models keep them together."""
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def one_process(models, tmp_path_factory) -> tuple[dict, list, list]:
    converted = tmp_path_factory.mktemp("converted") / "policy"
    assert main(["convert", "hf-to-megatron", str(models / "dense"), str(converted)]) == 0
    return run_distributed(in_one_process, 1, models, converted)[0]


@pytest.fixture(scope="module")
def two_processes(models, tmp_path_factory) -> tuple[dict, dict]:
    target = tmp_path_factory.mktemp("checkpoints")
    ranks = run_distributed(in_two_processes, 2, models, target, timeout_seconds=240)
    for name in TWO_PROCESSES:
        assert ranks[0][0][name]["updates"] == ranks[1][0][name]["updates"], "metrics must be the same on every rank"
    return ranks[0]


@pytest.fixture(scope="module")
def results(one_process, two_processes) -> dict[str, dict]:
    return one_process[0] | two_processes[0]


def reference_values(model: PreTrainedModel, batch: Experience) -> list[torch.Tensor]:
    return [
        model(torch.tensor([sequence.token_ids])).logits[0, sequence.num_context - 1 : -1, 0].float()
        for sequence in batch.sequences
    ]


def reference_updates(model: PreTrainedModel, count: int) -> tuple[list[dict], list[torch.Tensor]]:
    """The same updates in plain torch: metrics, and the values before them. The weights stay in the model.

    Adam moves float32 weights, which the model copies in its own dtype after every step.
    """
    master = copy.deepcopy(model).float()
    optimizer = adamw(master, OPTIMIZER)
    with torch.no_grad():
        before = reference_values(model, experience())
    batch = with_returns(experience(), tuple(before))
    metrics, step = [], 0
    for _ in range(count):
        losses, norms = [], []
        for _ in range(EPOCHS):
            for part in batch.mini_batches(MINI_BATCHES):
                new, old, target = (
                    torch.cat(x) for x in (reference_values(model, part), list(part.values), list(part.returns))
                )
                near = torch.minimum(torch.maximum(new, old - VALUE_CLIP), old + VALUE_CLIP)
                loss = (0.5 * torch.maximum((new - target) ** 2, (near - target) ** 2)).mean()
                model.zero_grad()
                loss.backward()
                for moved, parameter in zip(master.parameters(), model.parameters(), strict=True):
                    moved.grad = parameter.grad.float()
                norms.append(torch.nn.utils.clip_grad_norm_(master.parameters(), OPTIMIZER.gradient_clip_norm).item())
                for group in optimizer.param_groups:
                    group["lr"] = OPTIMIZER.learning_rate * min(1.0, (step + 1) / (OPTIMIZER.warmup_steps + 1))
                optimizer.step()
                with torch.no_grad():
                    for moved, parameter in zip(master.parameters(), model.parameters(), strict=True):
                        parameter.copy_(moved)
                losses.append(loss.item())
                step += 1
        metrics.append({"loss": sum(losses) / len(losses), "grad_norm": sum(norms) / len(norms)})
    return metrics, before


@pytest.mark.parametrize("name", TOKEN_CLASSIFIERS)
def test_values_and_updates_equal_transformers_and_adamw(results, models, tmp_path, name) -> None:
    model = trained_critic(models, name)
    initial = weights_on_disk(model, tmp_path / "before")
    metrics, before = reference_updates(model, count=2)
    moved = weights_on_disk(model, tmp_path / "after")
    result = results["one process" if name == "dense" else f"{name}: one process"]
    np.testing.assert_allclose(result["values"], torch.cat(before), rtol=0, atol=1e-5)
    for update, expected in zip(result["updates"], metrics, strict=True):
        assert {name: update[name] for name in expected} == pytest.approx(expected, rel=1e-5)
    assert 0 < result["updates"][0]["clip_fraction"] < 1 and result["updates"][0]["explained_variance"] < 1
    assert result["weights"].keys() == moved.keys()
    for name, weight in result["weights"].items():
        np.testing.assert_allclose(weight, moved[name], rtol=0, atol=1e-6, err_msg=name)
        assert (moved[name] - initial[name]).abs().max() > 1e-4, name


@pytest.mark.parametrize("name", [name for name, case in TWO_PROCESSES.items() if case.dtype == "float32"])
def test_every_layout_gives_the_same_values_and_updates(results, name) -> None:
    expected = results["MoE: one process" if TWO_PROCESSES[name].model == "MoE" else "one process"]
    actual = results[name]
    np.testing.assert_allclose(actual["values"], expected["values"], rtol=0, atol=1e-5)
    for one, other in zip(expected["updates"], actual["updates"], strict=True):
        assert other == pytest.approx(one, rel=1e-5, abs=1e-7)
    for name, weight in expected["weights"].items():
        np.testing.assert_allclose(actual["weights"][name], weight, rtol=0, atol=1e-6, err_msg=name)


@pytest.fixture(scope="module")
def bfloat16_reference(models) -> dict[str, tuple[list[dict], torch.Tensor]]:
    """By model: metrics of the updates, and the values before them."""
    updates = {name: reference_updates(trained_critic(models, name).bfloat16(), count=2) for name in TOKEN_CLASSIFIERS}
    return {name: (metrics, torch.cat(before)) for name, (metrics, before) in updates.items()}


@pytest.mark.parametrize("name", [name for name in (ONE_PROCESS | TWO_PROCESSES) if "bfloat16" in name])
def test_bfloat16_stays_close_to_transformers_in_bfloat16(results, bfloat16_reference, name) -> None:
    """Within 4 %, of the largest for values. One rounding is 0.4 %, and may choose another expert."""
    metrics, before = bfloat16_reference["MoE" if "MoE" in name else "dense"]
    np.testing.assert_allclose(results[name]["values"], before, rtol=0, atol=0.04 * before.abs().max().item())
    for update, expected in zip(results[name]["updates"], metrics, strict=True):
        assert {key: update[key] for key in expected} == pytest.approx(expected, rel=0.04)


def test_from_a_policy_it_starts_with_its_trunk_and_with_values_of_zero(models, one_process) -> None:
    """From an HF folder, and from the same policy converted to a Megatron checkpoint."""
    for largest_value, weights in one_process[1]:
        assert largest_value == 0.0
        assert not weights.pop("score.weight").any() and not weights.pop("score.bias").any()
        policy = load_file(models / "dense" / "model.safetensors")
        trunk = {name: weight for name, weight in policy.items() if name != "lm_head.weight"}
        assert weights.keys() == trunk.keys()
        assert all(np.array_equal(weight, trunk[name]) for name, weight in weights.items())


def test_a_resumed_critic_is_bitwise_the_uninterrupted_one(two_processes) -> None:
    same = two_processes[1]
    assert len(same) == 4 and all(same.values()), same


def test_a_head_that_differs_from_the_policys_is_accepted(models, one_process) -> None:
    for name, (largest_value, weights) in zip(OTHER_HEADS, one_process[2], strict=True):
        stored = load_file(models / name / "model.safetensors")
        stored.pop("lm_head.weight", None)
        for missing in weights.keys() - stored.keys():
            assert missing.startswith("score.") and not weights.pop(missing).any(), (name, missing)
        assert weights.keys() == stored.keys()
        assert all(np.array_equal(weight, stored[each]) for each, weight in weights.items()), name
        assert (largest_value > 0.0) == (name in CLASSIFIERS)
