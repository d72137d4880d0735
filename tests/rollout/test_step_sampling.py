"""Every way to sample a step, over a scripted engine: which groups are trained on, and what is recorded."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count

import pytest

from megatron_dsrl.config.rollout import DynamicSamplingConfig
from megatron_dsrl.rollout.asynchronous import Asynchronous
from megatron_dsrl.rollout.batch import BatchRequest, Feed, OnSamples, RolloutBatch
from megatron_dsrl.rollout.engines.errors import EnginesLostError
from megatron_dsrl.rollout.rollout import StepSamples, unwatched
from megatron_dsrl.rollout.sample import SamplingParameters
from megatron_dsrl.rollout.step_sampling import MixedRounds, Partial, UntilMixed, WholeBatch, step_sampling
from megatron_dsrl.rollout.unfinished import CarryOver
from tests.observability.synthetic_run import make_group
from tests.support.step_sampling import MIXED, RIGHT, WRONG, draw_in_order, rows, settings

draw = pytest.fixture(draw_in_order)


class ScriptedEngine:
    """Answers prompts in their order with the given rewards, one after the other."""

    weight_version = 1
    training_sampling = SamplingParameters(max_response_tokens=8, stop_token_ids=(0,))

    def __init__(self, rewards: list[tuple[float, ...]], failures: int = 0) -> None:
        self._rewards = rewards
        self.failures = failures
        self.asked: list[int] = []
        """Numbers of groups that were started together."""

    def sample_batch(self, feed: Feed, sampling: SamplingParameters, on_samples: OnSamples) -> RolloutBatch:
        if self.failures:
            self.failures -= 1
            raise EnginesLostError("gone")
        batch = RolloutBatch(BatchRequest(settings(wanted=1), feed, sampling, lambda: range(1, 2)), num_engines=1)
        for position in count():
            begun = len(batch.groups)
            batch.top_up()
            if len(batch.groups) > begun:
                self.asked.append(len(batch.groups) - begun)
            if feed.is_enough() or position == len(batch.groups):
                return batch
            prompt = batch.groups[position].prompt
            batch.finished[position] = group = make_group(list(self._rewards[prompt.index]), index=prompt.index)
            feed.judged(position, group)
            on_samples(len(group.samples))
        raise AssertionError


@pytest.mark.parametrize(
    ("section", "mode"),
    [
        ({}, WholeBatch),
        ({"dynamic_sampling": {}}, UntilMixed),
        ({"dynamic_sampling": {}, "deterministic": True}, MixedRounds),
        ({"partial_rollouts": {}}, Partial),
        ({"partial_rollouts": {}, "dynamic_sampling": {}}, Partial),
        ({"max_staleness": 1}, Asynchronous),
        ({"max_staleness": 2, "dynamic_sampling": {}}, Asynchronous),
    ],
)
def test_the_configuration_chooses_the_mode(section, mode) -> None:
    assert type(step_sampling(settings(2, **section), ScriptedEngine([]))) is mode


def test_a_whole_batch_is_begun_at_once_and_all_of_it_is_trained_on(draw) -> None:
    engine = ScriptedEngine([RIGHT, MIXED, WRONG])
    shown = []

    @contextmanager
    def watch(step: int, samples: int) -> Iterator[OnSamples]:
        shown.append((step, samples))
        yield shown.append

    samples = WholeBatch(settings(3), engine).sample(7, draw, watch)
    assert (rows(samples.groups), samples.others, engine.asked) == ([0, 1, 2], [], [3])
    assert shown == [(7, 6), 2, 2, 2]
    assert samples.generated_tokens == sum(len(each.response_ids) for group in samples.groups for each in group.samples)


def test_every_round_asks_for_what_is_missing_until_all_groups_are_mixed(draw) -> None:
    engine = ScriptedEngine([RIGHT, MIXED, WRONG, WRONG, MIXED, MIXED])
    samples = mixed_rounds(3, engine).sample(1, draw, unwatched)
    assert engine.asked == [3, 2, 1]
    assert rows(samples.groups) == [1, 4, 5] and all(group.rewards_differ for group in samples.groups)
    assert samples.metrics == {
        "dynamic_sampling/rounds": 3,
        "dynamic_sampling/sampled_groups": 6,
        "dynamic_sampling/surplus_groups": 0,
        "dynamic_sampling/missing_groups": 0,
    }


def test_oversampling_takes_fewer_rounds_and_leaves_a_surplus(draw) -> None:
    engine = ScriptedEngine([MIXED, WRONG, MIXED, MIXED])
    samples = mixed_rounds(2, engine, oversampling=1.6).sample(1, draw, unwatched)
    assert engine.asked == [4]
    assert rows(samples.groups) == [0, 2] and rows(samples.others) == [1, 3]
    assert samples.metrics["dynamic_sampling/surplus_groups"] == 1


def test_the_rounds_are_limited_and_what_is_missing_is_counted(draw) -> None:
    engine = ScriptedEngine([WRONG, MIXED, WRONG])
    samples = mixed_rounds(2, engine, max_rounds=2).sample(1, draw, unwatched)
    assert engine.asked == [2, 1] and rows(samples.groups) == [1]
    assert samples.metrics["dynamic_sampling/missing_groups"] == 1


def mixed_rounds(wanted: int, engine: ScriptedEngine, **limits: float) -> MixedRounds:
    return MixedRounds(settings(wanted, deterministic=True, dynamic_sampling=DynamicSamplingConfig(**limits)), engine)


def test_a_uniform_group_is_replaced_as_soon_as_it_is_judged(draw) -> None:
    engine = ScriptedEngine([WRONG, MIXED, RIGHT, MIXED])
    samples = UntilMixed(settings(2, dynamic_sampling=DynamicSamplingConfig()), engine).sample(1, draw, unwatched)
    assert engine.asked == [2, 1, 1]
    assert rows(samples.groups) == [1, 3] and rows(samples.others) == [0, 2]
    assert samples.metrics == {
        "dynamic_sampling/sampled_groups": 4,
        "dynamic_sampling/surplus_groups": 0,
        "dynamic_sampling/missing_groups": 0,
        "dynamic_sampling/aborted_groups": 0,
    }


def test_one_by_one_the_groups_of_a_step_are_limited_too(draw) -> None:
    engine = ScriptedEngine([WRONG, MIXED, WRONG, WRONG])
    dynamic = DynamicSamplingConfig(max_rounds=2)
    samples = UntilMixed(settings(2, dynamic_sampling=dynamic), engine).sample(1, draw, unwatched)
    assert sum(engine.asked) == 4 and rows(samples.groups) == [1]
    assert samples.metrics["dynamic_sampling/missing_groups"] == 1


def test_partial_rollouts_continue_what_the_step_before_left(draw) -> None:
    engine = ScriptedEngine([RIGHT] * 8)
    mode = Partial(settings(2, partial_rollouts={"oversampling": 2.0}), engine)
    first = mode.sample(1, draw, unwatched)
    assert rows(first.groups) == [0, 1] and first.metrics["partial_rollouts/left_groups"] == 2
    assert mode.carried == CarryOver(), "the run may be stopped before it trains on the step"
    first.commit()
    assert [group.prompt.index for group in mode.carried.unfinished] == [2, 3]

    second = mode.sample(2, draw, unwatched)
    assert rows(second.groups) == [2, 3] and second.metrics["partial_rollouts/continued_groups"] == 2
    assert engine.asked == [4, 2 + 2], "what was left, and enough new ones to keep four in flight"


def test_all_completed_groups_of_a_step() -> None:
    kept, other = make_group([1.0, 0.0], index=0), make_group([0.0, 0.0], index=1)
    assert StepSamples([kept], [other]).sampled == [kept, other]
