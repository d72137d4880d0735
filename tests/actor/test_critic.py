"""The critic against plain Transformers and torch: values, updates with clipping, every layout in real processes."""

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Qwen3ForCausalLM, Qwen3ForTokenClassification

from megatron_dsrl.actor.build import build_critic
from megatron_dsrl.actor.critic import Critic
from megatron_dsrl.algorithms.experience import Experience, Response, build_experience
from megatron_dsrl.cli import main
from megatron_dsrl.config.actor import ActorConfig, OptimizerConfig
from megatron_dsrl.config.critic import CriticConfig
from megatron_dsrl.config.data import PromptSetConfig
from megatron_dsrl.config.model import ModelConfig, ParallelConfig
from megatron_dsrl.config.phase import PostTrainSpaceConfig
from megatron_dsrl.config.run import RunConfig
from megatron_dsrl.model.parallel import destroy_parallel, parallel_layout
from tests.support.distributed import run_distributed
from tests.support.tiny_model import make_tiny_qwen3

OPTIMIZER = OptimizerConfig(
    learning_rate=3e-3,
    warmup_steps=2,
    eps=1e-2,  # with a tiny epsilon Adam's first steps are the sign of the gradient, which rounding can turn
    gradient_clip_norm=0.5,
)
VALUE_CLIP, MINI_BATCHES, EPOCHS = 0.05, 2, 2
ONE_PROCESS = {"one process": ParallelConfig()}
TWO_PROCESSES = {
    "tensor parallel": ParallelConfig(tensor_parallel_size=2),
    "sequence parallel": ParallelConfig(tensor_parallel_size=2, sequence_parallel=True),
    "pipeline parallel": ParallelConfig(pipeline_parallel_size=2),
    "data parallel": ParallelConfig(),
    "distributed optimizer": ParallelConfig(distributed_optimizer=True),
    "context parallel": ParallelConfig(context_parallel_size=2),
}
LAYOUTS = [*ONE_PROCESS, *TWO_PROCESSES]


def run_config(folder: Path, parallel: ParallelConfig, path: str | None) -> RunConfig:
    return RunConfig(
        name="test",
        steps=4,
        model=ModelConfig(path=str(folder), dtype="float32"),
        parallel=parallel,
        actor=ActorConfig(max_tokens_per_micro_batch=100),
        critic=CriticConfig(
            path=path,
            value_clip=VALUE_CLIP,
            mini_batches_per_rollout=MINI_BATCHES,
            epochs_per_rollout=EPOCHS,
            optimizer=OPTIMIZER,
        ),
        data=PromptSetConfig(source="unused"),
        phases=[{"name": "grpo", "space": {"name": "post_train"}, "advantage": {"name": "group_standardised"}}],
    )


def experience() -> Experience:
    """13 sequences of 1 to 17 scored tokens behind prompts of 3 to 7."""
    generator = torch.Generator().manual_seed(1)

    def tokens(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(127, (length,), generator=generator).tolist())

    lengths = [1 + (7 * number) % 17 for number in range(13)]
    batch = [Response(tokens(3 + n % 5), tokens(length), [-5.0] * length, 0.0, n) for n, length in enumerate(lengths)]
    return build_experience(batch, PostTrainSpaceConfig(), [])


def with_returns(batch: Experience, values: tuple[torch.Tensor, ...]) -> Experience:
    """Returns on either side of the values, so that the clip cuts some tokens and not others."""
    generator = torch.Generator().manual_seed(2)
    returns = tuple(value + 0.3 * torch.randn(value.shape, generator=generator) for value in values)
    return replace(batch, values=values, returns=returns)


def weights_of(critic: Critic) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for bucket in critic.hf_weights(bucket_bytes=10_000) for name, tensor in bucket}


def run_layouts(folder: Path, trained: Path, layouts: dict[str, ParallelConfig]) -> dict[str, dict]:
    """Values, two updates on the same returns, and the weights then; from a critic's folder, in every layout."""
    results = {}
    for name, parallel in layouts.items():
        with parallel_layout(parallel, seed=1):
            critic = build_critic(run_config(folder, parallel, str(trained)), folder, steps=4)
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


def stop_and_continue(folder: Path, trained: Path, target: Path) -> dict[str, bool]:
    """Whether a critic that was saved before its first step, and after two updates, goes on bit for bit."""
    same = {}
    for name in ("tensor parallel", "distributed optimizer"):
        parallel = TWO_PROCESSES[name]
        config = run_config(folder, parallel, str(trained))
        for updates in (0, 2):
            checkpoint = target / f"{name} {updates}"
            checkpoint.mkdir(exist_ok=True)
            with parallel_layout(parallel, seed=1):
                critic = build_critic(config, folder, steps=4)
                batch = with_returns(experience(), critic.values(experience()))
                for _ in range(updates):
                    critic.update(batch)
                write = critic.begin_save(checkpoint, copy=False)
                write.write()
                write.finish()
                expected = (critic.update(batch), weights_of(critic))
            with parallel_layout(parallel, seed=2):
                critic = build_critic(config, folder, steps=4)
                critic.load(checkpoint, same_layout=True)
                actual = (critic.update(batch), weights_of(critic))
            same_weights = all(np.array_equal(actual[1][key], weight) for key, weight in expected[1].items())
            same[f"{name} after {updates}"] = actual[0] == expected[0] and same_weights
    return same


def in_one_process(folder: Path, trained: Path, converted: Path) -> tuple[dict, list]:
    results = run_layouts(folder, trained, ONE_PROCESS), from_a_policy(folder, [None, str(converted)])
    destroy_parallel()
    return results


def in_two_processes(folder: Path, trained: Path, target: Path) -> tuple[dict, dict]:
    results = run_layouts(folder, trained, TWO_PROCESSES), stop_and_continue(folder, trained, target)
    destroy_parallel()
    return results


@pytest.fixture(scope="module")
def policy(tmp_path_factory) -> tuple[Path, Qwen3ForCausalLM]:
    folder = tmp_path_factory.mktemp("policy")
    return folder, make_tiny_qwen3(folder, tied=True, vocab_size=127)


@pytest.fixture(scope="module")
def trained(policy, tmp_path_factory) -> tuple[Path, Qwen3ForTokenClassification]:
    """A critic with a head that is not zero, as Transformers writes it."""
    folder = tmp_path_factory.mktemp("critic")
    model = Qwen3ForTokenClassification.from_pretrained(policy[0], num_labels=1).float().eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        model.score.weight.copy_(0.1 * torch.randn(model.score.weight.shape, generator=generator))
        model.score.bias.fill_(0.25)
    model.save_pretrained(folder)
    return folder, model


@pytest.fixture(scope="module")
def one_process(policy, trained, tmp_path_factory) -> tuple[dict, list]:
    converted = tmp_path_factory.mktemp("converted") / "policy"
    assert main(["convert", "hf-to-megatron", str(policy[0]), str(converted)]) == 0
    return run_distributed(in_one_process, 1, policy[0], trained[0], converted)[0]


@pytest.fixture(scope="module")
def two_processes(policy, trained, tmp_path_factory) -> tuple[dict, dict]:
    target = tmp_path_factory.mktemp("checkpoints")
    ranks = run_distributed(in_two_processes, 2, policy[0], trained[0], target, timeout_seconds=240)
    for name in TWO_PROCESSES:
        assert ranks[0][0][name]["updates"] == ranks[1][0][name]["updates"], "metrics must be the same on every rank"
    return ranks[0]


@pytest.fixture(scope="module")
def results(one_process, two_processes) -> dict[str, dict]:
    return one_process[0] | two_processes[0]


def reference_values(model: Qwen3ForTokenClassification, batch: Experience) -> list[torch.Tensor]:
    return [
        model(torch.tensor([sequence.token_ids])).logits[0, sequence.num_context - 1 : -1, 0]
        for sequence in batch.sequences
    ]


def reference_updates(model: Qwen3ForTokenClassification, count: int) -> tuple[list[dict], list[torch.Tensor]]:
    """The same updates in plain torch: metrics, and the values before them. The weights stay in the model."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]  # Megatron exempts them from weight decay
    optimizer = torch.optim.AdamW(
        [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}],
        OPTIMIZER.learning_rate,
        OPTIMIZER.betas,
        OPTIMIZER.eps,
        OPTIMIZER.weight_decay,
    )
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
                optimizer.zero_grad()
                loss.backward()
                norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER.gradient_clip_norm).item())
                for group in optimizer.param_groups:
                    group["lr"] = OPTIMIZER.learning_rate * min(1.0, (step + 1) / (OPTIMIZER.warmup_steps + 1))
                optimizer.step()
                losses.append(loss.item())
                step += 1
        metrics.append({"loss": sum(losses) / len(losses), "grad_norm": sum(norms) / len(norms)})
    return metrics, before


def test_values_and_updates_equal_transformers_and_adamw(results, trained):
    model = copy.deepcopy(trained[1])
    metrics, before = reference_updates(model, count=2)
    result = results["one process"]
    np.testing.assert_allclose(result["values"], torch.cat(before), rtol=0, atol=1e-5)
    for update, expected in zip(result["updates"], metrics, strict=True):
        assert {name: update[name] for name in expected} == pytest.approx(expected, rel=1e-5)
    assert 0 < result["updates"][0]["clip_fraction"] < 1 and result["updates"][0]["explained_variance"] < 1
    initial, moved = trained[1].state_dict(), model.state_dict()
    assert result["weights"].keys() == moved.keys()
    for name, weight in result["weights"].items():
        np.testing.assert_allclose(weight, moved[name], rtol=0, atol=1e-6, err_msg=name)
        assert (moved[name] - initial[name]).abs().max() > 1e-4, name


@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_every_layout_gives_the_same_values_and_updates(results, layout):
    expected, actual = results["one process"], results[layout]
    np.testing.assert_allclose(actual["values"], expected["values"], rtol=0, atol=1e-5)
    for one, other in zip(expected["updates"], actual["updates"], strict=True):
        assert other == pytest.approx(one, rel=1e-5, abs=1e-7)
    for name, weight in expected["weights"].items():
        np.testing.assert_allclose(actual["weights"][name], weight, rtol=0, atol=1e-6, err_msg=name)


def test_from_a_policy_it_starts_with_its_trunk_and_with_values_of_zero(policy, one_process):
    """From an HF folder, and from the same policy converted to a Megatron checkpoint."""
    for largest_value, weights in one_process[1]:
        assert largest_value == 0.0
        assert not weights.pop("score.weight").any() and not weights.pop("score.bias").any()
        trunk = {name: weight for name, weight in policy[1].state_dict().items() if name != "lm_head.weight"}
        assert weights.keys() == trunk.keys()
        assert all(np.array_equal(weight, trunk[name]) for name, weight in weights.items())


def test_a_resumed_critic_is_bitwise_the_uninterrupted_one(two_processes):
    same = two_processes[1]
    assert len(same) == 4 and all(same.values()), same
