"""The reference policy: nothing of the policy moves when it is used, KL terms against it are right, it resumes."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import Qwen3ForCausalLM

from megatron_dsrl.actor.actor import Actor
from megatron_dsrl.actor.build import build_actor
from megatron_dsrl.actor.reference import ReferencePolicy
from megatron_dsrl.algorithms.experience import Experience
from megatron_dsrl.algorithms.objective import Objective, build_objectives
from megatron_dsrl.config.actor import ActorConfig
from megatron_dsrl.config.model import ParallelConfig
from megatron_dsrl.config.phase import KLConfig, PhaseConfig
from megatron_dsrl.model.parallel import destroy_parallel, parallel_layout
from tests.actor.test_actor import GRPO, OPTIMIZER, TEMPERATURE, objective_of, run_config
from tests.support.actors import flat, weights_of
from tests.support.distributed import run_distributed
from tests.support.plain_torch import adamw
from tests.support.tiny_model import make_tiny_qwen3

COEFFICIENT = 0.5
KL = GRPO.model_copy(update={"kl": KLConfig(loss_coefficient=COEFFICIENT, loss_estimator="k3")})
ACTOR = ActorConfig(max_tokens_per_micro_batch=100)
LAYOUTS = {
    "tensor parallel": ParallelConfig(tensor_parallel_size=2),
    "distributed optimizer": ParallelConfig(distributed_optimizer=True),
}


def objective_with_reference(phase: PhaseConfig, reference: ReferencePolicy) -> Objective:
    experience = objective_of(phase).experience  # all samples: GRPO filters none
    experience = replace(experience, reference_log_probs=reference.log_probs(experience))
    (objective,) = build_objectives(phase, [experience], max_response_tokens=64)
    return objective


def parameters_of(actor: Actor) -> list[torch.Tensor]:
    return [parameter.detach().clone() for chunk in actor.model.chunks for parameter in chunk.parameters()]


def all_equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def kl_steps(folder: Path) -> dict:
    """In one process: a plain step, then one with a KL term against the initial weights."""
    with parallel_layout(ParallelConfig(), seed=1):
        actor = build_actor(run_config(folder, ParallelConfig(), ACTOR), folder)
        reference = ReferencePolicy(actor)
        first = flat(actor.update([objective_with_reference(KL, reference)]))
        second = flat(actor.update([objective_with_reference(KL, reference)]))
        result = {"first": first, "second": second, "weights": weights_of(actor)}
    destroy_parallel()
    return result


def log_probs(model: nn.Module, experience: Experience) -> torch.Tensor:
    parts = []
    for sequence in experience.sequences:
        logits = model(torch.tensor([sequence.token_ids])).logits[0, sequence.num_context - 1 : -1] / TEMPERATURE
        targets = torch.tensor(sequence.token_ids[sequence.num_context :])
        parts.append(F.log_softmax(logits, -1).gather(1, targets[:, None])[:, 0])
    return torch.cat(parts)


def transformers_steps(model: Qwen3ForCausalLM) -> list[dict]:
    """The same two steps in plain torch: loss = mean(-A + beta (exp(d) - d - 1)), d = lp_ref - lp."""
    experience = objective_of(GRPO).experience
    advantages = torch.cat(experience.advantages)
    policy = copy.deepcopy(model)
    optimizer = adamw(policy, OPTIMIZER)
    with torch.no_grad():
        of_reference = log_probs(model, experience)
    steps = []
    for _ in range(2):
        current = log_probs(policy, experience)
        difference = of_reference - current
        divergence = difference.exp() - difference - 1
        loss = (-advantages * (current - current.detach()).exp() + COEFFICIENT * divergence).mean()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), OPTIMIZER.gradient_clip_norm)
        optimizer.step()
        steps.append({"loss": loss.item(), "grad_norm": norm.item(), "policy/reference_kl": divergence.mean().item()})
    return steps


def test_kl_of_a_policy_to_itself_is_zero_and_gradients_equal_transformers_after_a_step(model) -> None:
    (result,) = run_distributed(kl_steps, 1, model[0])
    first, second = transformers_steps(model[1])
    assert result["first"]["policy/reference_kl"] == 0.0
    assert result["first"]["grad_norm"] == pytest.approx(first["grad_norm"], rel=1e-5)
    assert second["policy/reference_kl"] > 1e-4
    assert {name: result["second"][name] for name in second} == pytest.approx(second, rel=1e-4, abs=1e-7)
    assert result["second"]["grad_norm"] == pytest.approx(second["grad_norm"], rel=1e-5)


def refresh_and_resume(folder: Path, target: Path) -> dict[str, dict[str, bool]]:
    """In every layout in bf16: what is bitwise the same."""
    same = {}
    for name, parallel in LAYOUTS.items():
        config = run_config(folder, parallel, ACTOR)
        config = config.model_copy(update={"model": config.model.model_copy(update={"dtype": "bfloat16"})})
        checkpoint = target / name.replace(" ", "_")
        (checkpoint / "actor").mkdir(parents=True, exist_ok=True)
        (checkpoint / "reference").mkdir(exist_ok=True)
        with parallel_layout(parallel, seed=1):
            actor = build_actor(config, folder)
            reference = ReferencePolicy(actor)
            initial = parameters_of(actor)
            of_initial = reference.log_probs(objective_of(GRPO).experience)
            untouched = all_equal(initial, parameters_of(actor))
            itself = all_equal(of_initial, actor.log_probs(objective_of(GRPO).experience))
            actor.update([objective_with_reference(KL, reference)])
            moved = parameters_of(actor)
            kept = all_equal(of_initial, reference.log_probs(objective_of(GRPO).experience))
            untouched &= all_equal(moved, parameters_of(actor)) and not all_equal(moved, initial)
            reference.refresh()
            actor.update([objective_with_reference(KL, reference)])
            models = {"actor": actor.model, "reference": reference}
            writes = [model.start_save(checkpoint / part, True) for part, model in models.items()]
            untouched &= reference.is_initial is False
            expected = flat(actor.update([objective_with_reference(KL, reference)])), parameters_of(actor)
            for write in writes:
                write.write()
                write.finish()
        with parallel_layout(parallel, seed=2):
            actor = build_actor(config, folder)
            reference = ReferencePolicy(actor)
            actor.model.load(checkpoint / "actor", same_layout=True)
            reference.load(checkpoint / "reference")
            actual = flat(actor.update([objective_with_reference(KL, reference)])), parameters_of(actor)
        resumed = actual[0] == expected[0] and all_equal(actual[1], expected[1])
        same[name] = {"untouched": untouched, "itself": itself, "kept": kept, "resumed": resumed}
    destroy_parallel()
    return same


def test_the_policy_is_untouched_and_a_refreshed_reference_resumes_bit_for_bit(model, tmp_path) -> None:
    for rank in run_distributed(refresh_and_resume, 2, model[0], tmp_path, timeout_seconds=240):
        assert rank == {name: dict.fromkeys(("untouched", "itself", "kept", "resumed"), True) for name in LAYOUTS}


def teacher_of_its_own(folder: Path, teacher_folder: Path) -> dict[str, bool]:
    """In two tensor-parallel processes in bf16: a reference with a different model's weights, and that model's
    actor."""
    parallel = ParallelConfig(tensor_parallel_size=2)
    config = run_config(folder, parallel, ACTOR)
    config = config.model_copy(update={"model": config.model.model_copy(update={"dtype": "bfloat16"})})
    experience = objective_of(GRPO).experience
    with parallel_layout(parallel, seed=1):
        actor = build_actor(config, folder)
        before = parameters_of(actor)
        reference = ReferencePolicy(actor)
        reference.load_model(teacher_folder)
        of_reference = reference.log_probs(experience)
        untouched = reference.is_initial and all_equal(before, parameters_of(actor))
        other = not all_equal(of_reference, actor.log_probs(experience))
        of_teacher = build_actor(config, teacher_folder).log_probs(experience)
    destroy_parallel()
    return {"untouched": untouched, "other": other, "equal": all_equal(of_reference, of_teacher)}


def test_a_reference_with_a_different_models_weights_scores_like_that_model(model, tmp_path) -> None:
    make_tiny_qwen3(tmp_path, tied=True, vocab_size=127, seed=2)
    for rank in run_distributed(teacher_of_its_own, 2, model[0], tmp_path):
        assert rank == {"untouched": True, "other": True, "equal": True}
