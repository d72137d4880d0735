"""The actor against a plain Transformers computation, and its invariance to layout, packing and sample order.

Every layout runs in real processes (gloo). Both spaces go through it, as DSRL's two phases do.
"""

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import Qwen3ForCausalLM

from megatron_dsrl.actor.build import build_actor
from megatron_dsrl.algorithms.advantages import GroupMean, GroupStandardised
from megatron_dsrl.algorithms.experience import Response, build_experience
from megatron_dsrl.algorithms.losses import PolicyLoss, supervised_loss
from megatron_dsrl.algorithms.objective import Objective, objectives_of
from megatron_dsrl.config.actor import ActorConfig, OptimizerConfig
from megatron_dsrl.config.data import PromptSetConfig
from megatron_dsrl.config.model import ModelConfig, ParallelConfig
from megatron_dsrl.config.phase import (
    PhaseConfig,
    PostTrainSpaceConfig,
    PreTrainSpaceConfig,
)
from megatron_dsrl.config.rollout import RolloutConfig
from megatron_dsrl.config.run import RunConfig
from megatron_dsrl.model.parallel import destroy_parallel, parallel_layout
from tests.support.distributed import run_distributed
from tests.support.tiny_model import make_tiny_qwen3

BOS = [3]
TEMPERATURE = 0.8
NSR_PRERL = PhaseConfig(
    name="NSR-PreRL",
    until_step=1,
    space=PreTrainSpaceConfig(),
    advantage=GroupMean(),
    filter="negative",
    coefficient=0.01,
)
GRPO = PhaseConfig(name="GRPO", space=PostTrainSpaceConfig(), advantage=GroupStandardised())
OPTIMIZER = OptimizerConfig(
    learning_rate=1e-2,
    eps=1e-2,  # with a tiny epsilon Adam's first step is the sign of the gradient, which rounding can turn
    gradient_clip_norm=0.02,
)

ONE_PROCESS = {
    "one process": (ParallelConfig(), ActorConfig(max_tokens_per_micro_batch=10_000)),
    "many micro-batches": (ParallelConfig(), ActorConfig(max_tokens_per_micro_batch=60)),
}
TWO_PROCESSES = {
    "tensor parallel": (ParallelConfig(tensor_parallel_size=2), ActorConfig(max_tokens_per_micro_batch=100)),
    "sequence parallel": (
        ParallelConfig(tensor_parallel_size=2, sequence_parallel=True),
        ActorConfig(max_tokens_per_micro_batch=100),
    ),
    "pipeline parallel": (ParallelConfig(pipeline_parallel_size=2), ActorConfig(max_tokens_per_micro_batch=100)),
    "data parallel": (ParallelConfig(), ActorConfig(max_tokens_per_micro_batch=100)),
    "distributed optimizer": (
        ParallelConfig(distributed_optimizer=True),
        ActorConfig(max_tokens_per_micro_batch=100),
    ),
}
LAYOUTS = [*ONE_PROCESS, *TWO_PROCESSES]


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


def objective_of(
    phase: PhaseConfig, prompt_seed: int = 0, loss: PolicyLoss | None = None, order: list[int] | None = None
) -> Objective:
    experience = build_experience(responses(prompt_seed), phase.space, BOS)
    (objective,) = objectives_of(phase, [experience], max_response_tokens=20)
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
        data=PromptSetConfig(source="unused"),
        rollout=RolloutConfig(temperature=TEMPERATURE),
        phases=[NSR_PRERL, GRPO],
    )


def run_layouts(folder: Path, layouts: dict[str, tuple[ParallelConfig, ActorConfig]]) -> dict[str, dict]:
    """In every layout: log-probs; a step of each phase, a supervised one, three off-policy ones; the weights then."""
    results = {}
    for name, (parallel, actor_config) in layouts.items():
        with parallel_layout(parallel, seed=1):
            actor = build_actor(run_config(folder, parallel, actor_config), folder)
            log_probs = torch.cat(actor.log_probs(objective_of(GRPO).experience)).numpy()
            updates = [actor.update([objective_of(phase)]).flat() for phase in (NSR_PRERL, GRPO)]
            updates.append(actor.update([objective_of(GRPO, loss=supervised_loss)]).flat())
            updates.append(actor.update([objective_of(GRPO)], mini_batches=3).flat())
            weights = {name: w.numpy() for bucket in actor.hf_weights(bucket_bytes=10_000) for name, w in bucket}
            results[name] = {"log_probs": log_probs, "updates": updates, "weights": weights}
    destroy_parallel()
    return results


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> tuple[Path, Qwen3ForCausalLM]:
    folder = tmp_path_factory.mktemp("model")
    # 127 tokens: the vocabulary is padded under tensor parallelism, and the padding must not count
    return folder, make_tiny_qwen3(folder, tied=True, vocab_size=127)


@pytest.fixture(scope="module")
def results(model, tmp_path_factory) -> dict[str, dict]:
    folder, _ = model
    (one,) = run_distributed(run_layouts, 1, folder, ONE_PROCESS)
    two, other_rank = run_distributed(run_layouts, 2, folder, TWO_PROCESSES)
    for name in TWO_PROCESSES:
        assert two[name]["updates"] == other_rank[name]["updates"], "metrics must be the same on every rank"
    return one | two


def reference(model: Qwen3ForCausalLM, phase: PhaseConfig) -> tuple[float, float]:
    """Loss and gradient norm of a phase in plain Transformers: on-policy, so the loss's gradient is A * grad log-prob.

    The gradients stay in the model.
    """
    total = torch.zeros(())
    kept = 0
    batch = responses()
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
            logits = model(torch.tensor([context + list(member.response_ids)])).logits[0, len(context) - 1 : -1]
            chosen = F.log_softmax(logits / TEMPERATURE, -1).gather(1, torch.tensor(member.response_ids)[:, None])
            total = total - advantage * (chosen - chosen.detach() + 1).sum()
            kept += len(member.response_ids)
    model.zero_grad()
    loss = phase.coefficient * total / kept
    loss.backward()
    return loss.item(), torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]).item()


def test_nsr_prerl_equals_transformers(results, model):
    loss, grad_norm = reference(model[1], NSR_PRERL)
    update = results["one process"]["updates"][0]
    assert update["loss"] == pytest.approx(loss, rel=1e-5)
    assert update["grad_norm"] == pytest.approx(grad_norm, rel=1e-5)


@pytest.mark.parametrize("phase", [NSR_PRERL, GRPO], ids=lambda phase: phase.name)
def test_updated_weights_equal_transformers_and_adamw(model, phase):
    """Every gradient element, seen through one step of a smooth Adam."""
    expected = copy.deepcopy(model[1])
    reference(expected, phase)
    torch.nn.utils.clip_grad_norm_(expected.parameters(), OPTIMIZER.gradient_clip_norm)
    matrices = [p for p in expected.parameters() if p.ndim > 1]
    vectors = [p for p in expected.parameters() if p.ndim == 1]  # Megatron exempts them from weight decay
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    before = {name: weight.detach().clone() for name, weight in expected.state_dict().items()}
    torch.optim.AdamW(groups, OPTIMIZER.learning_rate, OPTIMIZER.betas, OPTIMIZER.eps, OPTIMIZER.weight_decay).step()

    _, weights = run_distributed(run_one_phase, 1, model[0], phase, 0, None)[0]
    moved = 0.0
    for name, weight in weights.items():
        np.testing.assert_allclose(weight, expected.state_dict()[name], rtol=0, atol=1e-7, err_msg=name)
        moved = max(moved, (expected.state_dict()[name] - before[name]).abs().max().item())
    assert moved > 1e-4


def run_one_phase(folder: Path, phase: PhaseConfig, prompt_seed: int, order: list[int] | None) -> tuple[dict, dict]:
    """Metrics of one step in one process, and the weights after it."""
    parallel, actor_config = ONE_PROCESS["one process"]
    with parallel_layout(parallel, seed=1):
        actor = build_actor(run_config(folder, parallel, actor_config), folder)
        update = actor.update([objective_of(phase, prompt_seed, order=order)])
        weights = {name: w.numpy() for bucket in actor.hf_weights(bucket_bytes=10_000) for name, w in bucket}
    destroy_parallel()
    return update.flat(), weights


def test_grpo_equals_transformers_and_does_not_depend_on_sample_order(model):
    loss, grad_norm = reference(model[1], GRPO)
    update, _ = run_distributed(run_one_phase, 1, model[0], GRPO, 0, list(reversed(range(24))))[0]
    assert update["loss"] == pytest.approx(loss, rel=1e-5)
    assert update["grad_norm"] == pytest.approx(grad_norm, rel=1e-5)


def test_pre_train_space_does_not_depend_on_the_prompt(model, results):
    update, _ = run_distributed(run_one_phase, 1, model[0], NSR_PRERL, 99, None)[0]
    assert update == results["one process"]["updates"][0]


@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_every_layout_gives_the_same_losses_norms_and_weights(results, layout):
    expected, actual = results["one process"], results[layout]
    np.testing.assert_allclose(actual["log_probs"], expected["log_probs"], rtol=0, atol=1e-5)
    *on_policy, off_policy = zip(expected["updates"], actual["updates"], strict=True)
    for one, other in on_policy:
        assert other == pytest.approx(one, rel=1e-5, abs=1e-9)
    # over several steps the loss is a small difference of large terms: its rounding is theirs
    assert off_policy[1] == pytest.approx(off_policy[0], rel=1e-5, abs=1e-7)
    for name, weight in expected["weights"].items():
        # two units in the last place of a norm weight near 1; six steps moved most weights by a hundred times that
        np.testing.assert_allclose(actual["weights"][name], weight, rtol=0, atol=2.5e-7, err_msg=name)
