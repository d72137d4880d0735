"""Sampling until enough groups are mixed: one by one over a real engine, and in rounds."""

from collections.abc import Iterator
from dataclasses import replace

import pytest

from megatron_dsrl.config.rollout import DynamicSamplingConfig
from megatron_dsrl.rollout.carry_over import CarryOver
from megatron_dsrl.rollout.dynamic_sampling import (
    DynamicBatch,
    dynamic_sampling_metrics,
    is_mixed,
    sample_until_mixed,
)
from megatron_dsrl.rollout.engine_rollout import EngineRollout
from megatron_dsrl.rollout.sample import Group
from tests.observability.synthetic_run import make_group
from tests.support.engine import numbered_prompts

RIGHT, WRONG, MIXED = [1.0, 1.0], [0.0, 0.0], [0.0, 1.0]
WANTED, SAMPLES = 4, 3
PROMPTS = [replace(prompt, token_ids=prompt.token_ids[:20]) for prompt in numbered_prompts(64)]


@pytest.fixture
def calls() -> list:
    """Every call to the engine, when it has ended."""
    return []


@pytest.fixture
def rollout(engine_rollout: EngineRollout, monkeypatch, calls) -> EngineRollout:
    """Wants 4 groups."""
    changes = {"prompts_per_step": WANTED, "samples_per_prompt": SAMPLES}
    section = engine_rollout._config.rollout.model_copy(update=changes)
    monkeypatch.setattr(engine_rollout, "_config", engine_rollout._config.model_copy(update={"rollout": section}))
    monkeypatch.setattr(engine_rollout, "_on_call", calls.append)
    return engine_rollout


def configure(rollout: EngineRollout, monkeypatch, tokens: int = 24, **limits: float) -> None:
    """Dynamic sampling with these limits; a rare stop token makes the lengths differ a lot."""
    section = rollout._config.rollout.model_copy(update={"dynamic_sampling": DynamicSamplingConfig(**limits)})
    monkeypatch.setattr(rollout, "_config", rollout._config.model_copy(update={"rollout": section}))
    sampling = replace(rollout.training_sampling, max_response_tokens=tokens, stop_token_ids=(0,))
    monkeypatch.setattr(rollout, "_training_sampling", sampling)


def test_the_surplus_is_aborted_as_soon_as_there_are_enough(rollout, monkeypatch, calls):
    configure(rollout, monkeypatch, tokens=400, oversampling=6.0)
    rollout.generate(PROMPTS[:1], 1, rollout.training_sampling, "warm up")  # and the verifier's processes
    calls.clear()
    waiting: Iterator = iter(PROMPTS)

    batch = rollout.sample_enough(1, lambda n: [next(waiting) for _ in range(n)], lambda group: True, CarryOver())

    begun = [prompt.index for prompt in PROMPTS[: 6 * WANTED]]
    assert next(waiting) == PROMPTS[6 * WANTED]
    everything = [*batch.accepted, *batch.left.finished, *batch.left.unfinished]
    assert sorted(group.prompt.index for group in everything) == begun, "none is lost or doubled"
    assert len(batch.accepted) == WANTED
    assert [group.prompt.index for group in batch.accepted] == sorted(group.prompt.index for group in batch.accepted)
    assert batch.left.unfinished and batch.left.num_tokens > 0, "some were in the middle"
    assert all(not group.is_complete for group in batch.left.unfinished)
    assert batch.generated_tokens == sum(call.tokens for call in calls)


def test_without_oversampling_every_group_is_replaced_and_nothing_is_aborted(rollout, monkeypatch, calls):
    configure(rollout, monkeypatch)
    asked = []

    def draw(count: int):
        asked.append(count)
        begun = sum(asked)
        return PROMPTS[begun - count : begun]

    batch = rollout.sample_enough(2, draw, lambda group: group.prompt.index % 2 == 0, CarryOver())

    assert [group.prompt.index % 2 for group in batch.accepted] == [0] * WANTED
    assert {group.prompt.index % 2 for group in batch.rejected} == {1}
    assert batch.left == CarryOver()
    assert sum(asked) == WANTED + len(batch.rejected) == len(calls)
    assert asked[0] == WANTED and sum(asked[1:]) == len(batch.rejected)
    assert {call.outcome for call in calls} == {"done"}


def test_the_groups_of_a_step_are_limited(rollout, monkeypatch, calls):
    configure(rollout, monkeypatch, max_rounds=2)
    waiting: Iterator = iter(PROMPTS)

    batch = rollout.sample_enough(
        3, lambda n: [next(waiting) for _ in range(n)], lambda group: group.prompt.index == 101, CarryOver()
    )

    assert ([group.prompt.index for group in batch.accepted], len(batch.rejected)) == ([101], 2 * WANTED - 1)
    assert len(calls) == 2 * WANTED and batch.left == CarryOver()
    assert dynamic_sampling_metrics(batch.accepted, batch.rejected, WANTED)["dynamic_sampling/missing_groups"] == 3


def test_a_prompt_that_comes_again_in_a_step_gets_other_samples(rollout, monkeypatch):
    configure(rollout, monkeypatch)
    batch = rollout.sample_enough(4, lambda n: PROMPTS[:1] * n, lambda group: True, CarryOver())
    again = rollout.sample_enough(4, lambda n: PROMPTS[:1] * n, lambda group: True, CarryOver())

    responses = [sample.response_ids for group in batch.accepted for sample in group.samples]
    assert len(set(responses)) == WANTED * SAMPLES
    assert responses == [sample.response_ids for group in again.accepted for sample in group.samples]


def sample(rounds: list[list[list[float]]], wanted: int, **limits: object) -> tuple[DynamicBatch, list[int]]:
    """The batch made of the given rounds of rewards, and how many prompts each round was asked for."""
    asked = []

    def sample_round(number: int, count: int) -> list[Group]:
        asked.append(count)
        return [make_group(rewards, index=100 * number + i) for i, rewards in enumerate(rounds[number])]

    return sample_until_mixed(sample_round, wanted, DynamicSamplingConfig(**limits)), asked


def test_every_round_asks_for_what_is_missing_until_all_groups_are_mixed():
    batch, asked = sample([[RIGHT, MIXED, WRONG], [WRONG, MIXED], [MIXED]], wanted=3)
    assert asked == [3, 2, 1]
    assert [group.prompt.index for group in batch.kept] == [1, 101, 200]
    assert all(map(is_mixed, batch.kept)) and batch.rounds == 3
    assert dynamic_sampling_metrics(batch.kept, batch.others, wanted=3) == {
        "dynamic_sampling/sampled_groups": 6,
        "dynamic_sampling/surplus_groups": 0,
        "dynamic_sampling/missing_groups": 0,
    }


def test_oversampling_takes_fewer_rounds_and_leaves_a_surplus():
    batch, asked = sample([[MIXED, WRONG, MIXED, MIXED]], wanted=2, oversampling=1.6)
    assert asked == [4]
    assert [group.prompt.index for group in batch.kept] == [0, 2]
    assert dynamic_sampling_metrics(batch.kept, batch.others, wanted=2)["dynamic_sampling/surplus_groups"] == 1


def test_the_rounds_are_limited_and_what_is_missing_is_counted():
    batch, asked = sample([[WRONG, MIXED], [WRONG]], wanted=2, max_rounds=2)
    assert asked == [2, 1] and len(batch.kept) == 1
    assert dynamic_sampling_metrics(batch.kept, batch.others, wanted=2)["dynamic_sampling/missing_groups"] == 1
