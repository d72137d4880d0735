"""Every way to sample a step, over a scripted engine: which groups are trained on, and what the record says of it."""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest

from megatron_dsrl.config.rollout import DynamicSamplingConfig, RolloutConfig
from megatron_dsrl.config.run import RunConfig
from megatron_dsrl.data.prompt import Prompt
from megatron_dsrl.rollout.batch import BatchRequest, RolloutBatch, StaleWeightsError
from megatron_dsrl.rollout.carry_over import CarryOver
from megatron_dsrl.rollout.dispatcher import EnginesLostError
from megatron_dsrl.rollout.engines.errors import EngineError
from megatron_dsrl.rollout.feed import Feed
from megatron_dsrl.rollout.group_queue import GroupQueue
from megatron_dsrl.rollout.progress import OnSamples
from megatron_dsrl.rollout.sample import SampleGroup, SamplingParameters
from megatron_dsrl.rollout.step_sampling import (
    Asynchronous,
    Draw,
    MixedRounds,
    Partial,
    StepSamples,
    UntilMixed,
    WholeBatch,
    is_mixed,
    step_sampling,
    unwatched,
)
from tests.observability.synthetic_run import make_group
from tests.support.engine import numbered_prompts, tiny_run_config
from tests.support.waiting import wait_until

RIGHT, WRONG, MIXED = (1.0, 1.0), (0.0, 0.0), (0.0, 1.0)


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
        batch = RolloutBatch(BatchRequest(feed, sampling, 1, False, 1, 60.0, None, 1, 1.0, 1.0), num_engines=1)
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


def settings(wanted: int, **section: object) -> RunConfig:
    config = tiny_run_config(Path("model"))
    rollout = RolloutConfig(prompts_per_step=wanted, samples_per_prompt=2, **section)
    return config.model_copy(update={"rollout": rollout})


@pytest.fixture
def draw() -> Draw:
    """The prompts 0, 1, 2, ... in their order."""
    prompts = iter([replace(prompt, index=index) for index, prompt in enumerate(numbered_prompts(64))])
    return lambda number: [next(prompts) for _ in range(number)]


def rows(groups: list[SampleGroup]) -> list[int]:
    return [group.prompt.index for group in groups]


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
    assert rows(samples.groups) == [1, 4, 5] and all(map(is_mixed, samples.groups))
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
    assert [group.prompt.index for group in mode.carried.unfinished] == [2, 3]

    second = mode.sample(2, draw, unwatched)
    assert rows(second.groups) == [2, 3] and second.metrics["partial_rollouts/continued_groups"] == 2
    assert engine.asked == [4, 2 + 2], "what was left, and enough new ones to keep four in flight"


class ThreadedEngine:
    """Works on the open groups of a queue in the background, one after the other, as if with the given weights."""

    training_sampling = SamplingParameters(max_response_tokens=8, stop_token_ids=(0,))

    def __init__(self, rewards: dict[int, tuple[float, ...]] | None = None, failures: int = 0) -> None:
        self.weight_version = 1
        self.rewards = rewards or {}
        self.failures = failures
        self.recovered = 0
        self.begun: list[int] = []
        """Prompts in the order in which they were begun."""
        self.may_finish = threading.Semaphore(0)
        """Released once for every group that may finish."""

    def sample_batch(self, feed: GroupQueue, sampling: SamplingParameters, on_samples: OnSamples) -> None:
        in_flight: deque[tuple[int, Prompt, int]] = deque()
        positions = count()
        while not feed.is_enough():
            for group in feed.take(len(in_flight)):
                self.begun.append(group.prompt.index)
                in_flight.append((next(positions), group.prompt, self.weight_version))
            if self.failures:
                self.failures -= 1
                raise EnginesLostError("gone")
            if in_flight and self.may_finish.acquire(timeout=0.01):
                position, prompt, version = in_flight.popleft()
                group = make_group(list(self.rewards.get(prompt.index, MIXED)), index=prompt.index)
                samples = tuple(replace(each, weight_version=version, older_versions=()) for each in group.samples)
                feed.judged(position, replace(group, samples=samples))

    def recover_engines(self) -> None:
        self.recovered += 1

    def finish(self, groups: int) -> None:
        for _ in range(groups):
            self.may_finish.release()


class TestAsynchronous:
    """Engines sample while the trainer updates, within the bound on staleness."""

    @pytest.fixture
    def start(self) -> Iterator[Callable[..., Asynchronous]]:
        modes = []

        def start(engine: ThreadedEngine, last_step: int | None = None, **section: object) -> Asynchronous:
            modes.append(step_sampling(settings(2, **{"max_staleness": 2, **section}), engine, last_step))
            return modes[-1]

        yield start
        for mode in modes:
            mode.close()

    def test_groups_are_begun_as_far_ahead_as_the_bound_allows_and_none_gets_older(self, start, draw) -> None:
        engine = ThreadedEngine()
        mode = start(engine)
        stalest = []
        for step in range(1, 8):
            engine.weight_version = step  # what the push after the last step has loaded
            engine.finish(2)
            samples = mode.sample(step, draw, unwatched)
            assert rows(samples.groups) == [2 * step - 2, 2 * step - 1], "in the order in which they were begun"
            assert len(engine.begun) <= 2 * (step + 2)
            stalest.append(samples.metrics["asynchronous/max_staleness"])
        assert stalest == [0, 1, 2, 2, 2, 2, 2]
        assert samples.metrics["asynchronous/mean_staleness"] == 2
        assert samples.metrics["asynchronous/unfinished_groups"] == 4

    def test_new_weights_open_the_next_places(self, start, draw) -> None:
        engine = ThreadedEngine()
        mode = start(engine, max_staleness=1)
        engine.finish(100)
        mode.sample(1, draw, unwatched)
        time.sleep(0.1)
        assert engine.begun == [0, 1, 2, 3], "step 3's groups would be two steps old with the weights of step 1"
        engine.weight_version = 2
        mode.sample(2, draw, unwatched)
        wait_until(lambda: len(engine.begun) == 6, seconds=10.0)

    def test_nothing_is_sampled_beyond_the_last_step(self, start, draw) -> None:
        engine = ThreadedEngine()
        mode = start(engine, last_step=2)
        engine.finish(100)
        mode.sample(1, draw, unwatched)
        mode.sample(2, draw, unwatched)
        time.sleep(0.1)
        assert engine.begun == [0, 1, 2, 3] and mode.carried == CarryOver()

    def test_a_continued_run_trains_on_what_was_finished_and_samples_the_rest_again(self, start, draw) -> None:
        engine = ThreadedEngine()
        mode = start(engine)
        engine.finish(3)
        mode.sample(1, draw, unwatched)
        wait_until(lambda: len(mode.carried.finished) == 1, seconds=10.0)
        left = mode.carried
        assert rows(list(left.finished)) == [2] and [each.prompt.index for each in left.unfinished] == [3, 4, 5]

        continued = ThreadedEngine()
        continued.weight_version = 2
        mode = start(continued)
        mode.carried = left
        assert mode.carried == left, "until its first step"
        continued.finish(100)
        assert rows(mode.sample(2, draw, unwatched).groups) == [2, 3]
        assert continued.begun[0] == 3 and rows(mode.sample(3, draw, unwatched).groups) == [4, 5]

    def test_groups_that_a_lower_bound_makes_too_old_start_over(self, start, draw) -> None:
        engine = ThreadedEngine()
        engine.weight_version = 5
        engine.finish(100)
        mode = start(engine, max_staleness=1)
        aged = [
            replace(group, samples=tuple(replace(each, weight_version=version) for each in group.samples))
            for group, version in ((make_group([1.0, 0.0], index=40), 4), (make_group([1.0, 0.0], index=41), 2))
        ]
        mode.carried = CarryOver(finished=tuple(aged))
        samples = mode.sample(5, draw, unwatched)
        assert rows(samples.groups) == [40, 41] and engine.begun[0] == 41
        assert samples.metrics["asynchronous/max_staleness"] == 1

    def test_an_interrupted_step_leaves_what_it_had_and_none_of_what_it_has_drawn(self, start, draw) -> None:
        engine = ThreadedEngine()
        mode = start(engine)
        engine.finish(2)
        mode.sample(1, draw, unwatched)
        before = mode.carried

        @contextmanager
        def interrupted(step: int, samples: int) -> Iterator[OnSamples]:
            raise KeyboardInterrupt
            yield

        with pytest.raises(KeyboardInterrupt):
            mode.sample(2, draw, interrupted)
        assert mode.carried == before

    def test_after_a_loss_of_engines_what_was_in_flight_is_sampled_again(self, start, draw) -> None:
        engine = ThreadedEngine(failures=1)
        engine.finish(100)
        assert rows(start(engine).sample(1, draw, unwatched).groups) == [0, 1]
        assert engine.recovered == 1 and engine.begun[:12] == [*range(6), *range(6)]

    def test_another_failure_ends_the_run(self, start, draw) -> None:
        class Failing(ThreadedEngine):
            def sample_batch(self, *arguments: object) -> None:
                raise StaleWeightsError("old")

        with pytest.raises(StaleWeightsError):
            start(Failing()).sample(1, draw, unwatched)

    def test_a_step_that_takes_too_long_names_the_late_prompts(self, start, draw) -> None:
        mode = start(ThreadedEngine(), step_timeout_seconds=0.1)
        with pytest.raises(EngineError, match=r"rollout.step_timeout_seconds = 0.1; .* first of 6\): 0, 1, 2, 3, 4, 5"):
            mode.sample(1, draw, unwatched)

    def test_uniform_groups_give_their_place_to_the_next(self, start, draw) -> None:
        engine = ThreadedEngine({0: WRONG, 3: RIGHT})
        mode = start(engine, dynamic_sampling={})
        engine.finish(100)
        first, second = mode.sample(1, draw, unwatched), mode.sample(2, draw, unwatched)
        assert rows(first.groups) == [1, 2] and rows(second.groups) == [4, 5]
        assert {0, 3} == set(rows(first.others + second.others))

    def test_dynamic_sampling_ends_with_fewer_groups_when_its_limit_is_reached(self, start, draw) -> None:
        engine = ThreadedEngine(dict.fromkeys(range(1, 64), WRONG))
        mode = start(engine, max_staleness=1, dynamic_sampling={"max_rounds": 3})
        engine.finish(100)
        samples = mode.sample(1, draw, unwatched)
        assert rows(samples.groups) == [0] and samples.metrics["dynamic_sampling/missing_groups"] == 1


def test_all_completed_groups_of_a_step() -> None:
    kept, other = make_group([1.0, 0.0], index=0), make_group([0.0, 0.0], index=1)
    assert StepSamples([kept], [other]).sampled == [kept, other]
