"""An update does not depend on how it is spread: every layout, micro-batch size and sample order gives the losses,
gradient norms, metrics and weights of one process, in both spaces.

Real processes over gloo, float32. The processes are started once; layouts follow one another in them.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_dsrl.actor.actor import Actor
from megatron_dsrl.actor.build import build_actor
from megatron_dsrl.algorithms.advantages import GroupMean, GroupStandardised
from megatron_dsrl.algorithms.aggregations import SequenceMean, TokenSum
from megatron_dsrl.algorithms.experience import Experience, PerToken, build_experience
from megatron_dsrl.algorithms.importance import Masked, Truncated
from megatron_dsrl.algorithms.losses import CISPO, GSPO, PolicyGradient, ScoredTokens, TokenLosses, supervised_loss
from megatron_dsrl.algorithms.objective import Objective, build_objectives
from megatron_dsrl.algorithms.spaces import PostTrain, PreTrain
from megatron_dsrl.config.actor import ActorConfig, OptimizerConfig
from megatron_dsrl.config.model import ParallelConfig
from megatron_dsrl.config.phase import AdditionalObjectiveConfig, KLConfig, PhaseConfig
from megatron_dsrl.config.run import RunConfig
from megatron_dsrl.model.parallel import destroy_parallel, parallel_layout
from tests.actor.test_actor import BOS, GRPO, NSR_PRERL, objective_of, responses, run_config, with_unscored_tokens
from tests.support.actors import flat, weights_of
from tests.support.distributed import run_distributed
from tests.support.random_experts import random_experts
from tests.support.tiny_run import REPOSITORY

OPTIMIZER = OptimizerConfig(
    learning_rate=0.1,  # steps so long that the rounding of the weights themselves stays below the tolerance
    eps=1e-2,  # with a tiny epsilon Adam's first step is the sign of the gradient, which rounding can turn
    gradient_clip_norm=0.1,  # below some of the norms, so that clipping counts
)
SEQUENCE_PARALLEL = {"tensor_parallel_size": 2, "sequence_parallel": True}
INTERLEAVED = {"pipeline_parallel_size": 2, "virtual_pipeline_stages": 2}
DISTRIBUTED = {"distributed_optimizer": True}
OTHER_METHODS = PhaseConfig(
    name="GSPO",
    space=PostTrain(),
    advantage=GroupStandardised(),
    loss=GSPO(clip_low=0.05, clip_high=0.05),
    aggregation=SequenceMean(),
    importance_correction=Masked(level="sequence"),
    kl=KLConfig(loss_coefficient=0.1),
    additional_objectives=[
        AdditionalObjectiveConfig(
            name="cispo",
            space=PreTrain(),
            advantage=GroupMean(),
            loss=CISPO(clip_high=0.1),
            aggregation=TokenSum(),
        ),
        AdditionalObjectiveConfig(
            name="reinforce",
            space=PostTrain(),
            advantage=GroupMean(),
            loss=PolicyGradient(),
            importance_correction=Truncated(cap=1.1),
            entropy_coefficient=0.05,
        ),
    ],
)


@dataclass(frozen=True)
class Case:
    """One way of computing the update."""

    model: str = "dense"
    parallel: dict[str, Any] = field(default_factory=dict)
    max_tokens: int = 100
    recompute: str = "none"
    reverse_samples: bool = False
    dtype: str = "float32"
    layer_spec: str = "auto"
    kept_logits_megabytes: int = 0
    given_experts: bool = False
    """Routing replay in the post-train space."""


ONE_PROCESS = {
    "1 process": Case(max_tokens=10_000, kept_logits_megabytes=1024),
    "1 process, a sequence per micro-batch": Case(max_tokens=1),
    "1 process, samples reversed": Case(reverse_samples=True),
    "1 process, selective recomputation": Case(recompute="selective"),
    "1 process, full recomputation": Case(recompute="full"),
    "MoE: 1 process": Case("MoE", max_tokens=10_000, kept_logits_megabytes=1024),
    "MoE: 1 process, full recomputation": Case("MoE", recompute="full"),
    "MoE, routing replay: 1 process": Case("MoE", max_tokens=10_000, given_experts=True),
}
TWO_PROCESSES = {
    "TP 2": Case(parallel={"tensor_parallel_size": 2}),
    "TP 2, again": Case(parallel={"tensor_parallel_size": 2}),
    "TP 2 with sequence parallelism": Case(parallel=SEQUENCE_PARALLEL),
    "PP 2, uneven stages": Case(parallel={"pipeline_parallel_size": 2, "layers_in_first_stage": 1}),
    "PP 2 x 2 virtual stages": Case(parallel=INTERLEAVED),
    "CP 2": Case(parallel={"context_parallel_size": 2}),
    "DP 2": Case(),
    "DP 2, again": Case(),
    "DP 2, distributed optimizer": Case(parallel={"distributed_optimizer": True}),
    "MoE: EP 2, distributed optimizer": Case("MoE", {"expert_parallel_size": 2, "distributed_optimizer": True}),
    "MoE: TP 2 with sequence parallelism, EP 2, experts whole": Case(
        "MoE", SEQUENCE_PARALLEL | {"expert_parallel_size": 2, "expert_tensor_parallel_size": 1}
    ),
    "MoE, routing replay: TP 2 with sequence parallelism, experts split too": Case(
        "MoE", SEQUENCE_PARALLEL, given_experts=True
    ),
    "MoE, routing replay: CP 2, EP 2": Case(
        "MoE", {"context_parallel_size": 2, "expert_parallel_size": 2}, given_experts=True
    ),
    "MoE, routing replay: PP 2 x 2 virtual stages, full recomputation": Case(
        "MoE", INTERLEAVED, recompute="full", given_experts=True
    ),
}
MORE_OF_TWO_PROCESSES = {
    "TP 2 with sequence parallelism, full recomputation": Case(parallel=SEQUENCE_PARALLEL, recompute="full"),
    "PP 2": Case(parallel={"pipeline_parallel_size": 2}),
    "CP 2, selective recomputation": Case(parallel={"context_parallel_size": 2}, recompute="selective"),
    "CP 2, distributed optimizer": Case(parallel={"context_parallel_size": 2, "distributed_optimizer": True}),
    "DP 2, samples reversed": Case(reverse_samples=True),
    "MoE: DP 2, distributed optimizer": Case("MoE", DISTRIBUTED),
    "MoE: EP 2": Case("MoE", {"expert_parallel_size": 2}),
    "MoE: TP 2 with sequence parallelism, experts split too": Case("MoE", SEQUENCE_PARALLEL),
    "MoE: CP 2, EP 2": Case("MoE", {"context_parallel_size": 2, "expert_parallel_size": 2}),
    "MoE: PP 2 x 2 virtual stages": Case("MoE", INTERLEAVED),
}
FOUR_PROCESSES = {
    "TP 2 x PP 2": Case(parallel={"tensor_parallel_size": 2, "pipeline_parallel_size": 2}),
    "TP 2 with sequence parallelism x PP 2 x 2 virtual stages": Case(parallel=SEQUENCE_PARALLEL | INTERLEAVED),
    "CP 2 x TP 2 with sequence parallelism": Case(parallel=SEQUENCE_PARALLEL | {"context_parallel_size": 2}),
    "CP 2 x PP 2 x 2 virtual stages": Case(parallel=INTERLEAVED | {"context_parallel_size": 2}),
    "CP 4": Case(parallel={"context_parallel_size": 4}),
    "CP 2 x DP 2, distributed optimizer": Case(parallel={"context_parallel_size": 2, "distributed_optimizer": True}),
    "TP 2 with sequence parallelism x DP 2, distributed optimizer": Case(parallel=SEQUENCE_PARALLEL | DISTRIBUTED),
    "PP 2 x 2 virtual stages x DP 2, distributed optimizer": Case(parallel=INTERLEAVED | DISTRIBUTED),
    "MoE: EP 4": Case("MoE", {"expert_parallel_size": 4}),
    "MoE: EP 2 x expert DP 2, distributed optimizer": Case("MoE", {"expert_parallel_size": 2} | DISTRIBUTED),
    "MoE: TP 2 with sequence parallelism x DP 2, EP 2 x expert DP 2, experts whole, distributed optimizer": Case(
        "MoE", SEQUENCE_PARALLEL | {"expert_parallel_size": 2, "expert_tensor_parallel_size": 1} | DISTRIBUTED
    ),
    "MoE: TP 2 with sequence parallelism x EP 2, experts split too": Case(
        "MoE", SEQUENCE_PARALLEL | {"expert_parallel_size": 2}
    ),
    "MoE: EP 2 x PP 2 x 2 virtual stages": Case("MoE", INTERLEAVED | {"expert_parallel_size": 2}),
}


def sequence_loss(tokens: ScoredTokens) -> TokenLosses:
    """Ratios of whole sequences, and an entropy bonus: what needs every token of a sequence, and the entropy's
    gradient."""
    differences = (tokens.log_probs - tokens.old_log_probs).split(tokens.num_scored)
    ratios = torch.cat([x.mean().exp().expand(len(x)) for x in differences]) if differences else tokens.log_probs
    return TokenLosses(-tokens.advantages * ratios - 0.1 * tokens.entropy, {"ratio": ratios.detach()})


def objective_in(case: Case, phase: PhaseConfig, order: list[int] | None = None) -> Objective:
    """As `objective_of`, in the case's own way."""
    objective = objective_of(phase, order=order)
    return replace(objective, experience=with_experts(case, objective.experience))


def with_experts(case: Case, experience: Experience) -> Experience:
    if not (case.given_experts and experience.prompt_in_context):
        return experience
    experts = random_experts(experience.sequences, layers=4, experts=4, experts_per_token=2)
    return replace(experience, routed_experts=experts)


def other_methods(case: Case, actor: Actor, order: list[int] | None) -> list[Objective]:
    """The remaining losses, aggregations, importance corrections and the KL term, in one step and off-policy: every
    log-prob that they compare with differs from the policy's by some noise."""
    experiences = []
    for objective in OTHER_METHODS.objectives.values():
        batch = with_unscored_tokens(responses())
        experience = build_experience(batch, objective.space, BOS).select(order or range(24))
        experience = with_experts(case, experience)
        now = actor.log_probs(experience)
        old, engine, reference = (with_noise(experience, now, seed) for seed in (1, 2, 3))
        logs = {"old_log_probs": old, "engine_log_probs": engine, "reference_log_probs": reference}
        experiences.append(replace(experience, **logs))
    return build_objectives(OTHER_METHODS, experiences, max_response_tokens=20)


def one_sample_with_a_gradient(objective: Objective) -> Objective:
    """The same one in every order."""
    experience = objective.experience
    assert experience.advantages is not None
    chosen = max(objective.samples_with_gradient, key=lambda i: experience.sequences[i].token_ids)
    advantages = tuple(
        values if i == chosen else torch.zeros_like(values) for i, values in enumerate(experience.advantages)
    )
    return replace(objective, experience=replace(experience, advantages=advantages), name="one_sample")


def with_noise(experience: Experience, log_probs: PerToken, seed: int) -> PerToken:
    """That depends on the sequence and not on its place in the batch."""
    generators = [torch.Generator().manual_seed(1000 * sum(s.token_ids) + seed) for s in experience.sequences]
    return tuple(
        values + 0.1 * torch.randn(values.shape, generator=generator)
        for values, generator in zip(log_probs, generators)
    )


def objectives(case: Case, actor: Actor) -> Iterator[tuple[list[Objective], int]]:
    """What is updated one after the other, and in how many mini-batches: both phases of DSRL, two objectives at once,
    every other method, off-policy steps, and batches that leave some or all data-parallel ranks nothing to compute."""
    order = list(range(24))[::-1] if case.reverse_samples else None
    negative = len(objective_of(NSR_PRERL).experience)
    pre_train = objective_of(NSR_PRERL, order=order and list(range(negative))[::-1])
    post_train = objective_in(case, GRPO, order)
    needs_all = {"needs_entropy_gradient": True, "needs_every_sample": True}
    sequences = replace(post_train, loss=sequence_loss, **needs_all, name="sequences")
    supervised = replace(pre_train, loss=supervised_loss, coefficient=0.5, name="supervised")
    yield from [([pre_train], 1), ([post_train], 1), ([sequences, supervised], 1)]
    yield other_methods(case, actor, order), 1
    yield [one_sample_with_a_gradient(post_train)], 1
    if not case.reverse_samples:
        yield [sequences], 3
        yield [post_train], 3  # the samples of the first mini-batch have no gradient


def configuration(case: Case, folder: Path) -> RunConfig:
    parallel = ParallelConfig(collective_timeout_seconds=60, **case.parallel)
    actor = ActorConfig(max_tokens_per_micro_batch=case.max_tokens, kept_logits_megabytes=case.kept_logits_megabytes)
    config = run_config(folder / case.model, parallel, actor)
    changes = {"recompute": case.recompute, "dtype": case.dtype, "layer_spec": case.layer_spec}
    model = config.model.model_copy(update=changes)
    return config.model_copy(update={"model": model, "optimizer": OPTIMIZER})


def run_cases(folder: Path, cases: Mapping[str, Case]) -> dict[str, dict]:
    """Per case: log-probs before, what every update reported, and the weights after each."""
    results = {}
    for name, case in cases.items():
        config = configuration(case, folder)
        with parallel_layout(config.parallel, seed=1):
            actor = build_actor(config, folder / case.model)
            result = {"log_probs": torch.cat(actor.log_probs(objective_in(case, GRPO).experience)).numpy()}
            result["weights"], result["updates"] = [weights_of(actor)], []
            for step, mini_batches in objectives(case, actor):
                if mini_batches > 1:
                    step = [actor.with_old_log_probs(objective) for objective in step]
                result["updates"].append(flat(actor.update(step, mini_batches)))
                result["weights"].append(weights_of(actor))
            results[name] = result
    destroy_parallel()
    return results


@pytest.fixture(scope="module")
def one_process(folder) -> dict[str, dict]:
    return run_distributed(run_cases, 1, folder, ONE_PROCESS, timeout_seconds=300)[0]


@pytest.fixture(scope="module")
def two_processes(folder) -> dict[str, dict]:
    return same_on_every_rank(run_distributed(run_cases, 2, folder, TWO_PROCESSES, timeout_seconds=500))


@pytest.fixture(scope="module")
def more_of_two_processes(folder) -> dict[str, dict]:
    return same_on_every_rank(run_distributed(run_cases, 2, folder, MORE_OF_TWO_PROCESSES, timeout_seconds=500))


@pytest.fixture(scope="module")
def four_processes(folder) -> dict[str, dict]:
    return same_on_every_rank(run_distributed(run_cases, 4, folder, FOUR_PROCESSES, timeout_seconds=900))


def same_on_every_rank(ranks: list[dict[str, dict]]) -> dict[str, dict]:
    for name, result in ranks[0].items():
        for other in ranks[1:]:
            assert other[name]["updates"] == result["updates"], f"{name}: metrics must be the same on every rank"
    return ranks[0]


@dataclass(frozen=True)
class Errors:
    """Largest relative differences from one process over all updates of a case."""

    loss: float
    grad_norm: float
    metrics: float
    """Largest difference of the other numbers that an update reports."""
    parameters: float
    """Difference in norm relative to the change by the updates: |w - w'| / |w' - w before|, over all weights."""


def errors_of(result: dict, one: dict) -> Errors:
    relative: dict[str, float] = {}
    for numbers, expected in zip(result["updates"], one["updates"]):
        assert numbers.keys() == expected.keys()
        for name, value in expected.items():
            kind = name if name in ("loss", "grad_norm") else "metrics"
            # A loss near zero is a difference of terms of about 1, whose rounding is theirs.
            scale = max(abs(value), 0.1 if "loss" in name else 1e-6)
            relative[kind] = max(relative.get(kind, 0.0), abs(numbers[name] - value) / scale)
    parameters = 0.0
    for before, expected, actual in zip(one["weights"], one["weights"][1:], result["weights"][1:]):
        assert actual.keys() == expected.keys()
        difference, change = (
            math.sqrt(sum(np.square((a[name] - b[name]).astype(np.float64)).sum() for name in expected))
            for a, b in ((actual, expected), (expected, before))
        )
        assert change > 0.1, "the weights must have moved"
        parameters = max(parameters, difference / change)
    return Errors(relative["loss"], relative["grad_norm"], relative["metrics"], parameters)


def check(name: str, case: Case, results: dict[str, dict], one_process: dict[str, dict]) -> None:
    alike = ("MoE, routing replay" if case.given_experts else "MoE") + ": 1 process"
    result, one = results[name], one_process[alike if case.model == "MoE" else "1 process"]
    np.testing.assert_allclose(result["log_probs"], one["log_probs"], rtol=0, atol=1e-5)
    errors = errors_of(result, one)
    print(f"| {name} | {errors.loss:.1e} | {errors.grad_norm:.1e} | {errors.metrics:.1e} | {errors.parameters:.1e} |")
    assert max(errors.loss, errors.grad_norm, errors.parameters) < 1e-5, errors
    assert errors.metrics < 1e-4, "some are exponentials of log-prob differences"


@pytest.mark.parametrize("name", [name for name in ONE_PROCESS if not name.endswith("1 process")])
def test_micro_batches_order_and_recomputation(one_process, name) -> None:
    check(name, ONE_PROCESS[name], one_process, one_process)


@pytest.mark.parametrize("name", [name for name in TWO_PROCESSES if not name.endswith("again")])
def test_two_processes(one_process, two_processes, name) -> None:
    check(name, TWO_PROCESSES[name], two_processes, one_process)


@pytest.mark.parametrize("name", ["TP 2", "DP 2"])
def test_two_processes_repeat_bit_for_bit(two_processes, name) -> None:
    first, again = two_processes[name], two_processes[f"{name}, again"]
    assert first["updates"] == again["updates"]
    for weights, same in zip(first["weights"], again["weights"]):
        assert all(np.array_equal(weight, same[key]) for key, weight in weights.items())


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE_OF_TWO_PROCESSES)
def test_more_of_two_processes(one_process, more_of_two_processes, name) -> None:
    check(name, MORE_OF_TWO_PROCESSES[name], more_of_two_processes, one_process)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", FOUR_PROCESSES)
def test_four_processes(one_process, four_processes, name) -> None:
    check(name, FOUR_PROCESSES[name], four_processes, one_process)


def test_the_guide_has_every_layout() -> None:
    guide = (REPOSITORY / "examples" / "parallelism" / "README.md").read_text()
    shown = [row.split(" | ")[0].removeprefix("| ") for row in guide.splitlines() if row.count("e-0") == 4]
    compared = [name for name in ONE_PROCESS if not name.endswith("1 process")]
    compared += [name for name in TWO_PROCESSES if not name.endswith("again")]
    assert shown == [*compared, *MORE_OF_TWO_PROCESSES, *FOUR_PROCESSES]
