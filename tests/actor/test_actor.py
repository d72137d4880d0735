"""The actor in one process against a plain Transformers computation of the same update, in both spaces.

Other layouts are compared with one process in test_layouts.py.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_dsrl.actor.actor import Actor
from megatron_dsrl.actor.build import build_actor
from megatron_dsrl.algorithms.advantages import GroupMean, GroupStandardised
from megatron_dsrl.algorithms.aggregations import SequenceMean, TokenMean, TokenSum
from megatron_dsrl.algorithms.experience import Response, build_experience
from megatron_dsrl.algorithms.losses import PolicyLoss
from megatron_dsrl.algorithms.objective import Objective, build_objectives
from megatron_dsrl.algorithms.spaces import PostTrain, PreTrain
from megatron_dsrl.config.actor import ActorConfig, OptimizerConfig
from megatron_dsrl.config.data import DataConfig
from megatron_dsrl.config.model import ModelConfig, ParallelConfig
from megatron_dsrl.config.phase import PhaseConfig
from megatron_dsrl.config.rollout import RolloutConfig
from megatron_dsrl.config.run import RunConfig
from megatron_dsrl.model.parallel import parallel_layout
from tests.support.actors import flat
from tests.support.plain_torch import adamw

pytestmark = pytest.mark.usefixtures("torch_distributed")

BOS = [3]
TEMPERATURE = 0.8
NSR_PRERL = PhaseConfig(
    name="NSR-PreRL",
    until_step=1,
    space=PreTrain(),
    advantage=GroupMean(),
    filter="negative",
    coefficient=0.01,
)
GRPO = PhaseConfig(name="GRPO", space=PostTrain(), advantage=GroupStandardised())
OPTIMIZER = OptimizerConfig(
    learning_rate=1e-2,
    eps=1e-2,  # with a tiny epsilon Adam's first step is the sign of the gradient, which rounding can turn
    gradient_clip_norm=0.02,
)


def responses(prompt_seed: int = 0) -> list[Response]:
    """6 groups of 4 with a mix of rewards; one group all right, one all wrong."""
    generator = torch.Generator().manual_seed(1)
    prompts = torch.Generator().manual_seed(prompt_seed)

    def tokens(length: int, source: torch.Generator) -> tuple[int, ...]:
        return tuple(torch.randint(127, (length,), generator=source).tolist())

    batch = []
    for group in range(6):
        prompt = tokens(5 + group, prompts)
        for sample in range(4):
            reward = 1.0 if group == 0 or (group > 1 and sample < group - 2) else 0.0
            response = tokens(3 + (7 * sample + group) % 17, generator)
            batch.append(Response(prompt, response, [-5.0] * len(response), reward, group))
    return batch


def with_unscored_tokens(batch: list[Response]) -> list[Response]:
    """As after tool calls: every third token, and the first one of every second response, is not the policy's own."""
    return [
        replace(r, scored=tuple(i % 3 != 1 and (i > 0 or n % 2 == 0) for i in range(len(r.response_ids))))
        for n, r in enumerate(batch)
    ]


def objective_of(
    phase: PhaseConfig,
    prompt_seed: int = 0,
    loss: PolicyLoss | None = None,
    order: list[int] | None = None,
    batch: list[Response] | None = None,
) -> Objective:
    experience = build_experience(batch or responses(prompt_seed), phase.space, BOS)
    (objective,) = build_objectives(phase, [experience], max_response_tokens=20)
    experience = objective.experience.select(order or range(len(objective.experience)))
    return replace(objective, experience=experience, loss=loss or objective.loss)


def run_config(folder: Path, parallel: ParallelConfig, actor: ActorConfig) -> RunConfig:
    return RunConfig(
        name="test",
        steps=4,
        model=ModelConfig(path=str(folder), dtype="float32"),
        parallel=parallel,
        actor=actor,
        optimizer=OPTIMIZER,
        data=DataConfig(source="unused"),
        rollout=RolloutConfig(temperature=TEMPERATURE),
        phases=[NSR_PRERL, GRPO],
    )


@contextmanager
def one_process(folder: Path, **changes: Any) -> Iterator[Actor]:
    """An actor over one process; `dtype` and the optimizer's fields can be changed by name."""
    dtype = changes.pop("dtype", "float32")
    parallel, actor_config = ParallelConfig(), ActorConfig(max_tokens_per_micro_batch=200)
    config = run_config(folder, parallel, actor_config)
    config = config.model_copy(
        update={
            "model": config.model.model_copy(update={"dtype": dtype}),
            "optimizer": config.optimizer.model_copy(update=changes),
        }
    )
    with parallel_layout(parallel, seed=1):
        yield build_actor(config, folder)


def weights_of(actor: Actor) -> dict[str, Tensor]:
    return {name: weight.clone() for bucket in actor.model.hf_weights(bucket_bytes=10_000) for name, weight in bucket}


def reference(model: nn.Module, phase: PhaseConfig, batch: list[Response] | None = None) -> tuple[float, float]:
    """Loss and gradient norm of a phase in plain Transformers: on-policy, so the loss's gradient is A * grad log-prob.

    The gradients stay in the model.
    """
    total = torch.zeros(())
    kept = 0
    batch = batch or responses()
    for group in range(6):
        members = [r for r in batch if r.group == group]
        rewards = torch.tensor([r.reward for r in members])
        advantages = rewards - rewards.mean()
        if phase is GRPO:
            advantages = advantages / (rewards.std() + 1e-6)
        for member, advantage in zip(members, advantages):
            if phase is NSR_PRERL and not advantage < 0:
                continue
            context = BOS if phase is NSR_PRERL else list(member.prompt_ids)
            logits = model(torch.tensor([context + list(member.response_ids)])).logits[0, len(context) - 1 : -1].float()
            chosen = F.log_softmax(logits / TEMPERATURE, -1).gather(1, torch.tensor(member.response_ids)[:, None])
            chosen = chosen.flatten()[torch.tensor(member.scored or [True] * len(member.response_ids))]
            total = total - advantage * (chosen - chosen.detach() + 1).sum()
            kept += len(chosen)
    model.zero_grad()
    loss = phase.coefficient * total / kept
    loss.backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    return loss.item(), torch.nn.utils.get_total_norm(gradients).item()


@pytest.mark.parametrize("batch", [responses(), with_unscored_tokens(responses())], ids=["all scored", "masked"])
@pytest.mark.parametrize("phase", [NSR_PRERL, GRPO], ids=lambda phase: phase.name)
def test_an_update_equals_transformers_and_adamw(model, phase, batch) -> None:
    """Loss, gradient norm, and every gradient element, seen through one step of a smooth Adam."""
    folder, expected = model[0], copy.deepcopy(model[1])
    loss, grad_norm = reference(expected, phase, batch)
    torch.nn.utils.clip_grad_norm_(expected.parameters(), OPTIMIZER.gradient_clip_norm)
    adamw(expected, OPTIMIZER).step()

    with one_process(folder) as actor:
        update = actor.update([objective_of(phase, batch=batch)])
        weights = weights_of(actor)
    assert update.loss == pytest.approx(loss, rel=1e-5)
    assert update.grad_norm == pytest.approx(grad_norm, rel=1e-5)
    moved = 0.0
    for name, weight in weights.items():
        # one rounding of a float32 weight near 1
        torch.testing.assert_close(weight, expected.state_dict()[name], rtol=0, atol=1.2e-7, msg=name)
        moved = max(moved, (weight - model[1].state_dict()[name]).abs().max().item())
    assert moved > 1e-4


@pytest.mark.parametrize("mini_batches", [1, 3], ids=["one step", "2 epochs of 3, one of them without a gradient"])
@pytest.mark.parametrize(
    "aggregation", [TokenMean(), SequenceMean(), TokenSum()], ids=lambda aggregation: aggregation.name
)
def test_samples_without_a_gradient_change_nothing_and_are_not_computed(model, aggregation, mini_batches) -> None:
    """Three of the six groups are all right or all wrong. They count in the denominators."""
    phase = GRPO.model_copy(update={"aggregation": aggregation})
    updates, weights = [], []
    for needs_every_sample in (True, False):
        with one_process(model[0]) as actor:
            objective = replace(objective_of(phase), needs_every_sample=needs_every_sample)
            epochs = 1 if mini_batches == 1 else 2
            updates.append(actor.update([actor.with_old_log_probs(objective)], mini_batches, epochs))
            weights.append(weights_of(actor))
    computed, skipped = updates
    assert skipped.loss == pytest.approx(computed.loss, rel=1e-5, abs=1e-8)
    assert skipped.grad_norm == pytest.approx(computed.grad_norm, rel=1e-5)
    for name, weight in weights[1].items():
        torch.testing.assert_close(weight, weights[0][name], rtol=0, atol=1.2e-7 * mini_batches, msg=name)
    whole, left = computed.objectives["policy"], skipped.objectives["policy"]
    assert (left.kept_samples, left.kept_tokens) == (whole.kept_samples, whole.kept_tokens)
    assert (whole.totals()["skipped_fraction"], left.totals()["skipped_fraction"]) == (0, 0.5)
    assert whole.computed_tokens == whole.kept_tokens > left.computed_tokens > 0


def test_a_step_without_any_gradient_is_one_with_a_gradient_of_zero(model) -> None:
    """Bit for bit: moments and weights decay, and the norm is zero."""
    results = []
    for needs_every_sample in (True, False):
        with one_process(model[0]) as actor:
            actor.update([objective_of(GRPO)])
            before = weights_of(actor)
            objective = objective_of(GRPO)
            uniform = replace(objective, experience=objective.experience.select(range(8)))
            update = actor.update([replace(uniform, needs_every_sample=needs_every_sample)])
            assert (update.loss, update.grad_norm) == (0, 0)
            results.append(weights_of(actor))
    assert update.objectives["policy"].totals()["skipped_fraction"] == 1 and "policy/entropy" not in flat(update)
    assert all(torch.equal(weight, results[0][name]) for name, weight in results[1].items())
    assert any(not torch.equal(weight, before[name]) for name, weight in results[1].items())


def test_pre_train_space_does_not_depend_on_the_prompt(model) -> None:
    updates = []
    for prompt_seed in (0, 99):
        with one_process(model[0]) as actor:
            updates.append(flat(actor.update([objective_of(NSR_PRERL, prompt_seed)])))
    assert updates[0] == updates[1]


@pytest.mark.parametrize("phase", [NSR_PRERL, GRPO], ids=lambda phase: phase.name)
def test_skipping_the_old_log_probs_of_an_on_policy_step_changes_nothing(model, phase) -> None:
    """Bit for bit: the pass would compute the very log-probs that the update computes, and all ratios are 1."""
    results = []
    for with_pass in (False, True):
        with one_process(model[0]) as actor:
            objective = objective_of(phase)
            if with_pass:
                objective = actor.with_old_log_probs(objective)
                assert objective.experience.old_log_probs is not None
            results.append((flat(actor.update([objective])), weights_of(actor)))
    (skipped, weights), (computed, same_weights) = results
    assert skipped == computed
    assert all(torch.equal(weight, same_weights[name]) for name, weight in weights.items())


@pytest.mark.parametrize("phase", [NSR_PRERL, GRPO], ids=lambda phase: phase.name)
def test_bfloat16_stays_close_to_a_bfloat16_transformers_model(model, phase) -> None:
    """Within 2 %. Norms and softmax round at other places; bfloat16 has 8 bits, one rounding being 0.4 %."""
    folder, expected = model[0], copy.deepcopy(model[1]).to(torch.bfloat16)
    loss, grad_norm = reference(expected, phase)
    with one_process(folder, dtype="bfloat16") as actor:
        update = actor.update([objective_of(phase)])
        assert {weight.dtype for weight in weights_of(actor).values()} == {torch.bfloat16}
    assert update.loss == pytest.approx(loss, rel=0.02)
    assert update.grad_norm == pytest.approx(grad_norm, rel=0.02)


def test_steps_below_the_resolution_of_bfloat16_add_up_in_the_master_weights(model) -> None:
    """A norm weight near 1 has neighbours at a distance of 0.0039 to 0.0078; steps of 0.001 reach the next one."""
    small_steps = {"learning_rate": 1e-3, "eps": 1e-12, "gradient_clip_norm": 0.0, "weight_decay": 0.0}
    with one_process(model[0], dtype="bfloat16", **small_steps) as actor:
        before = weights_of(actor)["model.norm.weight"]
        moved = []
        for _ in range(8):
            actor.update([objective_of(GRPO)])
            moved.append((weights_of(actor)["model.norm.weight"] != before).double().mean().item())
    assert moved[0] < 0.3, "most are rounded back after one step"
    assert moved[-1] > 0.6, "but the master weights have moved on"


def test_a_mask_of_ones_changes_nothing(model) -> None:
    """Bit for bit."""
    batch, results = responses(), []
    for scored in (batch, [replace(r, scored=(True,) * len(r.response_ids)) for r in batch]):
        with one_process(model[0]) as actor:
            updates = [flat(actor.update([objective_of(phase, batch=scored)])) for phase in (NSR_PRERL, GRPO)]
            results.append((updates, weights_of(actor)))
    (without, weights), (with_mask, same_weights) = results
    assert without == with_mask
    assert all(torch.equal(weight, same_weights[name]) for name, weight in weights.items())


def test_an_update_is_repeatable_bit_for_bit(model) -> None:
    results = []
    for _ in range(2):
        with one_process(model[0]) as actor:
            updates = [flat(actor.update([objective_of(phase)])) for phase in (NSR_PRERL, GRPO)]
            results.append((updates, weights_of(actor)))
    (updates, weights), (same_updates, same_weights) = results
    assert updates == same_updates
    assert all(torch.equal(weight, same_weights[name]) for name, weight in weights.items())
