"""Memory that a model gives up between updates: nothing touches it meanwhile, and everything comes back bit for bit.

While it is away the tensors have no memory at all, so touching them would end the process.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from megatron_dsrl.actor.actor import Actor
from megatron_dsrl.actor.build import build_actor, build_critic
from megatron_dsrl.actor.critic import Critic
from megatron_dsrl.actor.offload import MODEL_PARTS
from megatron_dsrl.actor.reference import ReferencePolicy
from megatron_dsrl.model.parallel import destroy_parallel, parallel_layout
from tests.actor.test_actor import GRPO, NSR_PRERL, objective_of
from tests.actor.test_critic import experience, with_returns
from tests.actor.test_layouts import Case, configuration
from tests.support.actors import flat, weights_of
from tests.support.distributed import run_distributed

DISTRIBUTED = {"distributed_optimizer": True}
ONE_PROCESS = {
    "float32": Case(),
    "bfloat16": Case(dtype="bfloat16"),
    "float32, distributed optimizer": Case(parallel=DISTRIBUTED),
}
TWO_PROCESSES = {
    "DP 2, distributed optimizer": Case(parallel=DISTRIBUTED),
    "MoE: EP 2, distributed optimizer, bfloat16": Case(
        "MoE", DISTRIBUTED | {"expert_parallel_size": 2}, dtype="bfloat16"
    ),
    "PP 2 x 2 virtual stages": Case(parallel={"pipeline_parallel_size": 2, "virtual_pipeline_stages": 2}),
}


def go_away_and_come_back(model: Actor | Critic) -> list[int]:
    """In the order of a training step, with a push of the weights in the middle; the bytes of each switch."""
    memory = model.model.memory
    moved = [memory.offload(["gradients"]), memory.offload(["optimizer"])]
    assert sum(1 for bucket in model.model.hf_weights(bucket_bytes=10**5) for _ in bucket) > 0
    moved.append(memory.offload(MODEL_PARTS))
    assert memory.offload(MODEL_PARTS) == 0 and set(memory.away) == set(MODEL_PARTS)
    moved += [memory.onload(["parameters"]), memory.onload(MODEL_PARTS)]
    assert not memory.away
    return moved


def policy_steps(case: Case, folder: Path, offloads: bool) -> dict:
    """Updates in both spaces, a reset of the optimizer between them, and what the reference says in the end."""
    config = configuration(case, folder)
    with parallel_layout(config.parallel, seed=1):
        actor = build_actor(config, folder / case.model)
        reference, updates, moved = ReferencePolicy(actor), [], []
        for number, phase in enumerate((NSR_PRERL, GRPO, GRPO)):
            if offloads:
                moved = go_away_and_come_back(actor)
            if number == 2:
                actor.model.reset_optimizer()  # Adam's moments are other tensors then
            updates.append(flat(actor.update([objective_of(phase)])))
        if offloads:
            go_away_and_come_back(actor)
        scores = [tokens.numpy() for tokens in reference.log_probs(objective_of(GRPO).experience)]
        return {"updates": updates, "weights": weights_of(actor), "reference": scores, "moved": moved}


def critic_steps(case: Case, folder: Path, offloads: bool) -> dict:
    config = configuration(case, folder)
    with parallel_layout(config.parallel, seed=1):
        critic = build_critic(config, folder / case.model, steps=4)
        batch = with_returns(experience(), critic.values(experience()))
        updates, moved = [], []
        for _ in range(2):
            if offloads:
                moved = go_away_and_come_back(critic)
            updates.append(critic.update(batch))
        return {"updates": updates, "weights": weights_of(critic), "reference": [], "moved": moved}


def run_cases(folder: Path, cases: Mapping[str, Case]) -> dict[str, list[dict]]:
    """Every case without and with offloads, the critic's in the layout of the first."""
    results = {
        name: [policy_steps(case, folder, offloads) for offloads in (False, True)] for name, case in cases.items()
    }
    first = next(iter(cases.values()))
    results["critic"] = [critic_steps(first, folder, offloads) for offloads in (False, True)]
    destroy_parallel()
    return results


def in_one_process(folder: Path) -> tuple[dict[str, list[dict]], list[str]]:
    """The cases, and what refuses to work while a part is away."""
    config, refused = configuration(Case(), folder), []
    with parallel_layout(config.parallel, seed=1):
        actor = build_actor(config, folder / "dense")
        actor.model.memory.offload(["optimizer"])
        attempts = {
            "update": lambda: actor.update([objective_of(GRPO)]),
            "log_probs": lambda: actor.log_probs(objective_of(GRPO).experience),
            "reset": actor.model.reset_optimizer,
            "save": lambda: actor.model.start_save(folder, copy=True),
        }
        for name, attempt in attempts.items():
            with pytest.raises(AssertionError, match="in host memory"):
                attempt()
            refused.append(name)
    return run_cases(folder, ONE_PROCESS), refused


@pytest.fixture(scope="module")
def one_process(folder) -> tuple[dict[str, list[dict]], list[str]]:
    return run_distributed(in_one_process, 1, folder, timeout_seconds=200)[0]


@pytest.fixture(scope="module")
def two_processes(folder) -> dict[str, list[dict]]:
    return run_distributed(run_cases, 2, folder, TWO_PROCESSES, timeout_seconds=300)[0]


def check(without: dict, with_offloads: dict) -> None:
    assert with_offloads["updates"] == without["updates"]
    assert with_offloads["weights"].keys() == without["weights"].keys()
    assert all(np.array_equal(weight, without["weights"][name]) for name, weight in with_offloads["weights"].items())
    for one, other in zip(without["reference"], with_offloads["reference"], strict=True):
        assert np.array_equal(one, other)


@pytest.mark.parametrize("name", [*ONE_PROCESS, "critic"])
def test_updates_with_offloads_between_them_are_those_without(one_process, name) -> None:
    check(*one_process[0][name])


@pytest.mark.slow
@pytest.mark.parametrize("name", [*TWO_PROCESSES, "critic"])
def test_in_two_processes_too(two_processes, name) -> None:
    check(*two_processes[name])


@pytest.mark.parametrize(
    ("name", "bytes_per_parameter"),
    [
        ("float32", (4, 8, 4)),  # Megatron's optimizer moves the model's own weights
        ("bfloat16", (4, 12, 2)),  # and here float32 copies
    ],
)
def test_every_byte_is_given_up_and_taken_back(one_process, name, bytes_per_parameter) -> None:
    without, with_offloads = one_process[0][name]
    parameters = sum(weight.size for weight in without["weights"].values())
    padding = 64 * 64 * 4 * 16  # of the vocabulary, and Adam's step counts
    gradients, optimizer, weights, weights_back, rest_back = with_offloads["moved"]
    for moved, expected in zip((gradients, optimizer, weights), bytes_per_parameter, strict=True):
        assert 0 <= moved - expected * parameters < padding
    assert weights_back == weights and rest_back == gradients + optimizer


def test_nothing_works_on_half_a_model(one_process) -> None:
    assert one_process[1] == ["update", "log_probs", "reset", "save"]
