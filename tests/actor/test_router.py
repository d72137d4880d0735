"""Losses and precision of a mixture of experts' routers: the gradient of one optimizer step, with two objectives in it,
against plain Transformers and autograd, in one process and in layouts of two real ones.
"""

import copy
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from megatron.core.transformer.moe.moe_utils import switch_load_balancing_loss_func
from safetensors.numpy import load_file
from torch import Tensor
from transformers import Qwen3MoeForCausalLM
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from megatron_dsrl.actor.actor import Actor
from megatron_dsrl.actor.build import build_actor
from megatron_dsrl.algorithms.objective import Objective
from megatron_dsrl.config.actor import ActorConfig, OptimizerConfig
from megatron_dsrl.config.model import ParallelConfig, RouterConfig
from megatron_dsrl.model.parallel import destroy_parallel, parallel_layout
from megatron_dsrl.model.routed_experts import encode_routed_experts
from megatron_dsrl.model.router import Router
from tests.actor.test_actor import GRPO, NSR_PRERL, TEMPERATURE, objective_of, run_config
from tests.support.actors import flat, main_gradients_of
from tests.support.distributed import run_distributed
from tests.support.tiny_model import make_tiny_qwen3_moe

pytestmark = pytest.mark.usefixtures("torch_distributed")

BALANCING, Z = 0.5, 0.1
EXPERTS, CHOSEN = 4, 2
"""Experts per layer of the tiny model, and experts per token."""
OPTIMIZER = OptimizerConfig(learning_rate=1e-30, gradient_clip_norm=0)  # the weights stay, the gradients can be read
SEQUENCE_PARALLEL = {"tensor_parallel_size": 2, "sequence_parallel": True}
WHOLE_EXPERTS = {"expert_parallel_size": 2, "expert_tensor_parallel_size": 1}


@dataclass(frozen=True)
class Case:
    """One way of computing the step."""

    load_balancing: str = "aux_loss"
    a_sequence_per_row: bool = False
    parallel: dict[str, Any] = field(default_factory=dict)
    recompute: str = "none"
    reverse_samples: bool = False
    router_dtype: str = "float32"
    dtype: str = "float32"

    @property
    def router(self) -> RouterConfig:
        if self.load_balancing == "none":
            return RouterConfig(dtype=self.router_dtype)
        return RouterConfig(
            dtype=self.router_dtype,
            load_balancing=self.load_balancing,
            load_balancing_coefficient=BALANCING,
            z_loss_coefficient=Z,
        )


ONE_PROCESS = {
    "an objective per micro-batch": Case(),
    "a sequence per micro-batch": Case(a_sequence_per_row=True),
    "full recomputation": Case(recompute="full"),
    "router in float64": Case(router_dtype="float64"),
    "over the step": Case("global_aux_loss"),
    "over the step, full recomputation": Case("global_aux_loss", recompute="full"),
}
TWO_PROCESSES = {
    "DP 2, samples reversed": Case(a_sequence_per_row=True, reverse_samples=True),
    "EP 2": Case(a_sequence_per_row=True, parallel={"expert_parallel_size": 2}),
    "TP 2 with sequence parallelism": Case(parallel=SEQUENCE_PARALLEL | WHOLE_EXPERTS),
    "CP 2": Case(a_sequence_per_row=True, parallel={"context_parallel_size": 2}),
    "PP 2": Case(parallel={"pipeline_parallel_size": 2}),
    "PP 2 x 2 virtual stages": Case(
        a_sequence_per_row=True, parallel={"pipeline_parallel_size": 2, "virtual_pipeline_stages": 2}
    ),
    "over the step: DP 2": Case("global_aux_loss"),
    "over the step: EP 2": Case("global_aux_loss", parallel={"expert_parallel_size": 2}),
    "over the step: TP 2 with sequence parallelism": Case("global_aux_loss", parallel=SEQUENCE_PARALLEL),
    "over the step: CP 2": Case("global_aux_loss", parallel={"context_parallel_size": 2}),
    "over the step: PP 2": Case("global_aux_loss", parallel={"pipeline_parallel_size": 2}),
}
FOUR_PROCESSES = {
    "TP 2 with sequence parallelism x PP 2 x 2 virtual stages": Case(
        a_sequence_per_row=True,
        parallel=SEQUENCE_PARALLEL | {"pipeline_parallel_size": 2, "virtual_pipeline_stages": 2},
    ),
    "CP 2 x TP 2 with sequence parallelism": Case(
        a_sequence_per_row=True, parallel=SEQUENCE_PARALLEL | {"context_parallel_size": 2}
    ),
    "over the step: CP 2 x DP 2, full recomputation": Case(
        "global_aux_loss", parallel={"context_parallel_size": 2, "expert_parallel_size": 4}, recompute="full"
    ),
}


@dataclass(frozen=True)
class Outcome:
    """Results of an optimizer step."""

    gradients: dict[str, np.ndarray]
    """By the names of HF checkpoints."""
    balancing: float
    z: float


def objectives(reverse_samples: bool = False) -> list[Objective]:
    """5 samples in the post-train space and 4 in the pre-train space, with odd lengths among them: what is shared out
    in pairs needs padding."""
    step = -1 if reverse_samples else 1
    grpo = objective_of(GRPO, order=list(range(13, 18))[::step])
    nsr = objective_of(NSR_PRERL, order=list(range(2, 6))[::step])
    return [grpo, replace(nsr, coefficient=0.3, name="nsr")]


@contextmanager
def actor_of(case: Case, folder: Path) -> Iterator[Actor]:
    parallel = ParallelConfig(collective_timeout_seconds=60, **case.parallel)
    budget = ActorConfig(max_tokens_per_micro_batch=1 if case.a_sequence_per_row else 10_000)
    config = run_config(folder, parallel, budget)
    model = {"router": case.router, "recompute": case.recompute, "dtype": case.dtype}
    changes = {"model": config.model.model_copy(update=model), "optimizer": OPTIMIZER}
    with parallel_layout(parallel, seed=1):
        yield build_actor(config.model_copy(update=changes), folder)


def step_of(actor: Actor, reverse_samples: bool = False) -> Outcome:
    """A step, and the gradients that it leaves behind."""
    metrics = flat(actor.update(objectives(reverse_samples)))
    return Outcome(main_gradients_of(actor), metrics["router/load_balancing_loss"], metrics["router/z_loss"])


def run_cases(folder: Path, cases: Mapping[str, Case]) -> dict[str, Outcome]:
    outcomes = {}
    for name, case in cases.items():
        with actor_of(case, folder) as actor:
            outcomes[name] = step_of(actor, case.reverse_samples)
    destroy_parallel()
    return outcomes


def balancing_loss(probabilities: Tensor, shares: Tensor) -> Tensor:
    """E * sum_i f_i P_i."""
    return EXPERTS * (shares * probabilities.mean(0)).sum()


def dispatches_of(router_logits: Tensor) -> Tensor:
    return torch.bincount(router_logits.topk(CHOSEN, dim=1).indices.flatten(), minlength=EXPERTS)


def reference(model: Qwen3MoeForCausalLM, case: Case, scratch: Path) -> Outcome:
    """The same step in plain Transformers: on-policy, so the loss's gradient is A * grad log-prob."""
    policy, balancing, z, num_tokens = torch.zeros(()), torch.zeros(()), torch.zeros(()), 0
    dispatches_of_step = [torch.zeros(EXPERTS)] * len(model.model.layers)
    for objective in objectives():
        batch = objective.experience
        all_router_logits = []  # by sequence, then layer
        for sequence, advantages in zip(batch.sequences, batch.advantages):
            output = model(torch.tensor([sequence.token_ids]), output_router_logits=True)
            scored = torch.tensor(sequence.token_ids[sequence.num_context :])
            log_probs = F.log_softmax(output.logits[0, sequence.num_context - 1 : -1] / TEMPERATURE, -1)
            chosen = log_probs.gather(1, scored[:, None])[:, 0]
            weight = objective.coefficient / sum(batch.num_scored)
            policy = policy - weight * (advantages * (chosen - chosen.detach() + 1)).sum()
            all_router_logits.append(output.router_logits)
        rows = [[logits] for logits in all_router_logits] if case.a_sequence_per_row else [all_router_logits]
        for row in rows:
            for layer, of_layer in enumerate(zip(*row)):
                logits = torch.cat(of_layer)
                dispatches = dispatches_of(logits)
                dispatches_of_step[layer] = dispatches_of_step[layer] + dispatches
                counted = dispatches_of_step[layer] if case.load_balancing == "global_aux_loss" else dispatches
                balancing = balancing + len(logits) * balancing_loss(logits.softmax(-1), counted / counted.sum())
                z = z + torch.logsumexp(logits, -1).square().sum()
        num_tokens += sum(len(sequence.token_ids) for sequence in batch.sequences)
    model.zero_grad()
    (policy + BALANCING * balancing / num_tokens + Z * z / num_tokens).backward()
    of_all_layers = num_tokens * len(model.model.layers)
    return Outcome(gradients_of(model, scratch), balancing.item() / of_all_layers, z.item() / of_all_layers)


def gradients_of(model: Qwen3MoeForCausalLM, scratch: Path) -> dict[str, np.ndarray]:
    """By the names of checkpoints, where every expert has its own: so they are written as one."""
    as_weights = copy.deepcopy(model)
    with torch.no_grad():
        for weight, parameter in zip(as_weights.parameters(), model.parameters()):
            weight.copy_(parameter.grad)
    as_weights.save_pretrained(scratch)
    return load_file(scratch / "model.safetensors")


def check(outcome: Outcome, expected: Outcome) -> None:
    assert outcome.balancing == pytest.approx(expected.balancing, rel=1e-6)
    assert outcome.z == pytest.approx(expected.z, rel=1e-6)
    assert outcome.gradients.keys() == expected.gradients.keys()
    for name, gradient in expected.gradients.items():
        assert relative_error(outcome.gradients[name], gradient) < 5e-6, name


def relative_error(actual: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_tiny_qwen3_moe(folder, vocab_size=127)
    return folder


@pytest.fixture(scope="module")
def model(folder) -> Qwen3MoeForCausalLM:
    return Qwen3MoeForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def expected(model, tmp_path_factory) -> dict[tuple[str, bool], Outcome]:
    cases = [Case(a_sequence_per_row=True), Case(), Case("global_aux_loss")]
    scratch = tmp_path_factory.mktemp("scratch")
    return {(case.load_balancing, case.a_sequence_per_row): reference(model, case, scratch) for case in cases}


@pytest.fixture(scope="module")
def two_processes(folder) -> list[dict[str, Outcome]]:
    return run_distributed(run_cases, 2, folder, TWO_PROCESSES, timeout_seconds=200)


@pytest.fixture(scope="module")
def four_processes(folder) -> list[dict[str, Outcome]]:
    return run_distributed(run_cases, 4, folder, FOUR_PROCESSES, timeout_seconds=400)


def test_the_balancing_loss_is_megatrons() -> None:
    """Transformers' counts an expert per token as a whole dispatch, so that its loss is larger by their number."""
    logits = torch.randn(50, EXPERTS, generator=torch.Generator().manual_seed(1))
    dispatches = dispatches_of(logits)
    loss = balancing_loss(logits.softmax(-1), dispatches / dispatches.sum())
    megatron = switch_load_balancing_loss_func(logits.softmax(-1), dispatches, 50, CHOSEN, EXPERTS, 1.0)
    assert loss.item() == pytest.approx(megatron.item(), rel=1e-6)
    assert CHOSEN * loss.item() == pytest.approx(load_balancing_loss_func((logits,), EXPERTS, CHOSEN).item(), rel=1e-6)


@pytest.mark.parametrize("name", ONE_PROCESS)
def test_a_step_equals_transformers(folder, expected, name) -> None:
    case = ONE_PROCESS[name]
    with actor_of(case, folder) as actor:
        check(step_of(actor), expected[case.load_balancing, case.a_sequence_per_row])


@pytest.mark.parametrize("name", TWO_PROCESSES)
def test_a_step_of_two_processes_equals_transformers(expected, two_processes, name) -> None:
    case = TWO_PROCESSES[name]
    for rank in two_processes:
        check(rank[name], expected[case.load_balancing, case.a_sequence_per_row])


@pytest.mark.slow
@pytest.mark.parametrize("name", FOUR_PROCESSES)
def test_a_step_of_four_processes_equals_transformers(expected, four_processes, name) -> None:
    case = FOUR_PROCESSES[name]
    for rank in four_processes:
        check(rank[name], expected[case.load_balancing, case.a_sequence_per_row])


def test_what_is_balanced_depends_on_micro_batches(expected) -> None:
    """And the losses are large enough here for all these tests to see them."""
    values = [outcome.balancing for outcome in expected.values()]
    assert min(abs(a - b) for a in values for b in values if a is not b) > 1e-3
    routers = [outcome.gradients["model.layers.1.mlp.gate.weight"] for outcome in expected.values()]
    assert all(relative_error(a, b) > 0.01 for a in routers for b in routers if a is not b)


@pytest.mark.parametrize("load_balancing", ["aux_loss", "global_aux_loss"])
def test_nothing_is_left_for_the_next_step_or_for_scoring(folder, load_balancing) -> None:
    """Bit for bit: the weights stay, so two steps do the same, and log-probs are those of an actor without losses."""
    experience = objective_of(GRPO).experience
    with actor_of(Case("none"), folder) as actor:
        log_probs = torch.cat(actor.log_probs(experience))
    with actor_of(Case(load_balancing), folder) as actor:
        first, second = step_of(actor), step_of(actor)
        assert torch.equal(torch.cat(actor.log_probs(experience)), log_probs)
        off_policy = [actor.with_old_log_probs(objective) for objective in objectives()]
        assert actor.update(off_policy, mini_batches=2).router.keys() == {"load_balancing_loss", "z_loss"}
    assert (first.balancing, first.z) == (second.balancing, second.z)
    assert all(np.array_equal(gradient, second.gradients[name]) for name, gradient in first.gradients.items())


def test_a_uniform_router_has_a_loss_of_one(folder) -> None:
    with actor_of(Case(), folder) as actor, torch.no_grad():
        for router in routers_of(actor):
            router.weight.zero_()
        with torch.enable_grad():
            metrics = actor.update(objectives()).router
    assert metrics == pytest.approx({"load_balancing_loss": 1.0, "z_loss": math.log(EXPERTS) ** 2}, rel=1e-6)


def test_what_is_balanced_is_where_tokens_go(folder) -> None:
    """Under routing replay not where their routers would send them: here every token goes to experts 0 and 1."""
    objective, layers = objectives()[0], 4
    lengths = [len(sequence.token_ids) for sequence in objective.experience.sequences]
    first_two = tuple(encode_routed_experts(np.tile([0, 1], (length - 1, layers, 1))) for length in lengths)
    objective = replace(objective, experience=replace(objective.experience, routed_experts=first_two))
    probabilities = []

    def keep(router: Router, inputs: tuple, outputs: tuple) -> None:
        probabilities.append(router.gating(inputs[0]).detach().softmax(-1).flatten(0, -2))

    with actor_of(Case(), folder) as actor:
        for router in routers_of(actor):
            router.register_forward_hook(keep)
        metrics = actor.update([objective]).router
    expected = EXPERTS * torch.cat(probabilities)[:, :2].mean()
    assert len(probabilities) == layers
    assert metrics["load_balancing_loss"] == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("router_dtype", ["float32", "float64", "model"])
def test_dtype_of_the_router(folder, router_dtype) -> None:
    """In a bfloat16 model: that of the weights of the experts, and so of the product that they come from."""
    seen = set()
    with actor_of(Case(dtype="bfloat16", router_dtype=router_dtype), folder) as actor:
        for router in routers_of(actor):
            router.register_forward_hook(lambda module, inputs, outputs: seen.add(outputs[0].dtype))
        metrics = actor.update(objectives()).router
    assert seen == {getattr(torch, "bfloat16" if router_dtype == "model" else router_dtype)}
    assert all(math.isfinite(value) for value in metrics.values())


def routers_of(actor: Actor) -> list[Router]:
    return [module for chunk in actor.model.chunks for module in chunk.modules() if isinstance(module, Router)]
