"""Sampling until enough groups are accepted, over a real engine."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_dsrl.config.rollout import DynamicSamplingConfig
from megatron_dsrl.config.run import RunConfig
from megatron_dsrl.data.prompt import Prompt
from megatron_dsrl.observability.timeline import EngineCall
from megatron_dsrl.rollout.engine_rollout import EngineRollout
from megatron_dsrl.rollout.step_sampling import sample_until
from megatron_dsrl.rollout.unfinished import CarryOver
from tests.support.engine import numbered_prompts, tiny_run_config

WANTED, SAMPLES = 4, 3
PROMPTS = [replace(prompt, token_ids=prompt.token_ids[:20]) for prompt in numbered_prompts(64)]


@pytest.fixture
def calls(engine_rollout: EngineRollout, monkeypatch: pytest.MonkeyPatch) -> list[EngineCall]:
    """Every call to the engine, when it has ended."""
    calls: list[EngineCall] = []
    monkeypatch.setattr(engine_rollout, "_on_call", calls.append)
    return calls


@pytest.fixture
def rollout(engine_rollout: EngineRollout, monkeypatch: pytest.MonkeyPatch) -> EngineRollout:
    """A rare stop token makes the lengths differ a lot."""
    sampling = replace(engine_rollout.training_sampling, max_response_tokens=24, stop_token_ids=(0,))
    monkeypatch.setattr(engine_rollout, "training_sampling", sampling)
    return engine_rollout


def settings(folder: Path, **limits: float) -> RunConfig:
    """Dynamic sampling of 4 groups with these limits."""
    config = tiny_run_config(folder)
    section = config.rollout.model_copy(
        update={
            "prompts_per_step": WANTED,
            "samples_per_prompt": SAMPLES,
            "dynamic_sampling": DynamicSamplingConfig(**limits),
        }
    )
    return config.model_copy(update={"rollout": section})


def test_the_surplus_is_aborted_as_soon_as_there_are_enough(rollout, tiny_model_folder, calls, monkeypatch) -> None:
    config = settings(tiny_model_folder, oversampling=6.0)
    # The longest responses take seconds more than the first groups.
    sampling = replace(rollout.training_sampling, max_response_tokens=4000)
    monkeypatch.setattr(rollout, "training_sampling", sampling)
    rollout.generate(PROMPTS[:1], 1, rollout.training_sampling, "warm up")  # and the verifier's processes
    calls.clear()
    waiting: Iterator = iter(PROMPTS)

    batch = sample_until(
        config, rollout, 1, lambda n: [next(waiting) for _ in range(n)], lambda group: True, CarryOver()
    )

    begun = [prompt.index for prompt in PROMPTS[: 6 * WANTED]]
    assert next(waiting) == PROMPTS[6 * WANTED]
    everything = [*batch.accepted, *batch.left.finished, *batch.left.unfinished]
    assert sorted(group.prompt.index for group in everything) == begun, "none is lost or doubled"
    assert len(batch.accepted) == WANTED
    assert [group.prompt.index for group in batch.accepted] == sorted(group.prompt.index for group in batch.accepted)
    assert batch.left.unfinished and batch.left.num_tokens > 0, "some were in the middle"
    assert all(not group.is_complete for group in batch.left.unfinished)
    assert batch.generated_tokens == sum(call.tokens for call in calls)


def test_without_oversampling_every_group_is_replaced_and_nothing_is_aborted(rollout, tiny_model_folder, calls) -> None:
    config = settings(tiny_model_folder)
    asked = []

    def draw(count: int) -> list[Prompt]:
        asked.append(count)
        begun = sum(asked)
        return PROMPTS[begun - count : begun]

    batch = sample_until(config, rollout, 2, draw, lambda group: group.prompt.index % 2 == 0, CarryOver())

    assert [group.prompt.index % 2 for group in batch.accepted] == [0] * WANTED
    assert {group.prompt.index % 2 for group in batch.rejected} == {1}
    assert batch.left == CarryOver()
    assert sum(asked) == WANTED + len(batch.rejected) == len(calls)
    assert asked[0] == WANTED and sum(asked[1:]) == len(batch.rejected)
    assert {call.outcome for call in calls} == {"done"}


def test_the_groups_of_a_step_are_limited(rollout, tiny_model_folder, calls) -> None:
    config = settings(tiny_model_folder, max_rounds=2)
    waiting: Iterator = iter(PROMPTS)

    batch = sample_until(
        config,
        rollout,
        3,
        lambda n: [next(waiting) for _ in range(n)],
        lambda group: group.prompt.index == 101,
        CarryOver(),
    )

    assert ([group.prompt.index for group in batch.accepted], len(batch.rejected)) == ([101], 2 * WANTED - 1)
    assert len(calls) == 2 * WANTED and batch.left == CarryOver()


def test_a_prompt_that_recurs_in_a_step_gets_different_samples(rollout, tiny_model_folder) -> None:
    config = settings(tiny_model_folder)
    batch = sample_until(config, rollout, 4, lambda n: PROMPTS[:1] * n, lambda group: True, CarryOver())
    again = sample_until(config, rollout, 4, lambda n: PROMPTS[:1] * n, lambda group: True, CarryOver())

    responses = [tuple(sample.response_ids) for group in batch.accepted for sample in group.samples]
    assert len(set(responses)) == WANTED * SAMPLES
    assert responses == [tuple(sample.response_ids) for group in again.accepted for sample in group.samples]
