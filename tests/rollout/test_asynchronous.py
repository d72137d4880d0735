"""Sampling while the policy is updated, within the bound on staleness, over a scripted engine."""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import count

import pytest

from megatron_dsrl.data.prompt import Prompt
from megatron_dsrl.rollout.asynchronous import Asynchronous
from megatron_dsrl.rollout.batch import OnSamples, ignore
from megatron_dsrl.rollout.engines.errors import EngineError, EnginesLostError, StaleWeightsError
from megatron_dsrl.rollout.group_queue import GroupQueue
from megatron_dsrl.rollout.rollout import Draw, StepSamples, unwatched
from megatron_dsrl.rollout.sample import SamplingParameters
from megatron_dsrl.rollout.step_sampling import step_sampling
from megatron_dsrl.rollout.unfinished import CarryOver
from tests.observability.synthetic_run import make_group
from tests.support.step_sampling import MIXED, RIGHT, WRONG, draw_in_order, rows, settings
from tests.support.waiting import wait_until

draw = pytest.fixture(draw_in_order)


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


@pytest.fixture
def start() -> Iterator[Callable[..., Asynchronous]]:
    modes = []

    def start(engine: ThreadedEngine, last_step: int | None = None, **section: object) -> Asynchronous:
        modes.append(step_sampling(settings(2, **{"max_staleness": 2, **section}), engine, last_step))
        return modes[-1]

    yield start
    for mode in modes:
        mode.close()


def take(mode: Asynchronous, step: int, draw: Draw) -> StepSamples:
    """The samples of a step that is trained on."""
    samples = mode.sample(step, draw, unwatched)
    samples.commit()
    return samples


def prompts_of(carried: CarryOver) -> list[int]:
    return sorted(group.prompt.index for group in (*carried.finished, *carried.unfinished))


def test_groups_are_begun_as_far_ahead_as_the_bound_allows_and_none_gets_older(start, draw) -> None:
    engine = ThreadedEngine()
    mode = start(engine)
    stalest = []
    for step in range(1, 8):
        engine.weight_version = step  # what the push after the last step has loaded
        engine.finish(2)
        samples = take(mode, step, draw)
        assert rows(samples.groups) == [2 * step - 2, 2 * step - 1], "in the order in which they were begun"
        assert len(engine.begun) <= 2 * (step + 2)
        stalest.append(samples.metrics["asynchronous/max_staleness"])
    assert stalest == [0, 1, 2, 2, 2, 2, 2]
    assert samples.metrics["asynchronous/mean_staleness"] == 2
    assert samples.metrics["asynchronous/unfinished_groups"] == 4


def test_new_weights_open_the_next_places(start, draw) -> None:
    engine = ThreadedEngine()
    mode = start(engine, max_staleness=1)
    engine.finish(100)
    take(mode, 1, draw)
    time.sleep(0.1)
    assert engine.begun == [0, 1, 2, 3], "step 3's groups would be two steps old with the weights of step 1"
    engine.weight_version = 2
    take(mode, 2, draw)
    wait_until(lambda: len(engine.begun) == 6, seconds=10.0)


def test_nothing_is_sampled_beyond_the_last_step(start, draw) -> None:
    engine = ThreadedEngine()
    mode = start(engine, last_step=2)
    engine.finish(100)
    take(mode, 1, draw)
    take(mode, 2, draw)
    time.sleep(0.1)
    assert engine.begun == [0, 1, 2, 3] and mode.carried == CarryOver()


def test_a_continued_run_trains_on_what_was_finished_and_samples_the_rest_again(start, draw) -> None:
    engine = ThreadedEngine()
    mode = start(engine)
    engine.finish(3)
    take(mode, 1, draw)
    wait_until(lambda: len(mode.carried.finished) == 1, seconds=10.0)
    left = mode.carried
    assert rows(list(left.finished)) == [2] and [each.prompt.index for each in left.unfinished] == [3, 4, 5]

    continued = ThreadedEngine()
    continued.weight_version = 2
    mode = start(continued)
    mode.carried = left
    assert mode.carried == left, "until its first step"
    continued.finish(100)
    assert rows(take(mode, 2, draw).groups) == [2, 3]
    assert continued.begun[0] == 3 and rows(take(mode, 3, draw).groups) == [4, 5]


def test_groups_that_a_lower_bound_makes_too_old_start_over(start, draw) -> None:
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


@contextmanager
def interrupted_at_once(step: int, samples: int) -> Iterator[OnSamples]:
    raise KeyboardInterrupt
    yield


@contextmanager
def interrupted_when_all_is_sampled(step: int, samples: int) -> Iterator[OnSamples]:
    yield ignore
    raise KeyboardInterrupt


@pytest.mark.parametrize("watch", [interrupted_at_once, interrupted_when_all_is_sampled, unwatched])
def test_a_step_that_does_not_count_leaves_what_it_had_and_none_of_what_it_has_drawn(start, draw, watch) -> None:
    """With `unwatched` it ends, but is not committed: the run was asked to stop just then."""
    engine = ThreadedEngine({3: WRONG, 9: WRONG})
    mode = start(engine, dynamic_sampling={})
    engine.finish(2)
    take(mode, 1, draw)
    before = prompts_of(mode.carried)
    assert before == [2, 3, 4, 5, 6, 7]
    engine.finish(100)

    with suppress(KeyboardInterrupt):
        assert rows(mode.sample(2, draw, watch).groups) == [2, 4]
    assert prompts_of(mode.carried) == before

    continued = ThreadedEngine()
    continued.weight_version = 2
    continued.finish(100)
    resumed = start(continued, dynamic_sampling={})
    resumed.carried = mode.carried
    samples = take(resumed, 2, draw)
    if watch is not interrupted_at_once:
        assert rows(samples.groups) == [2, 4] and rows(samples.others) == [3]


def test_after_a_loss_of_engines_what_was_in_flight_is_sampled_again(start, draw) -> None:
    engine = ThreadedEngine(failures=1)
    engine.finish(100)
    assert rows(start(engine).sample(1, draw, unwatched).groups) == [0, 1]
    assert engine.recovered == 1 and engine.begun[:12] == [*range(6), *range(6)]


def test_another_failure_ends_the_run(start, draw) -> None:
    class Failing(ThreadedEngine):
        def sample_batch(self, *arguments: object) -> None:
            raise StaleWeightsError("old")

    with pytest.raises(StaleWeightsError):
        start(Failing()).sample(1, draw, unwatched)


def test_a_step_that_takes_too_long_names_the_late_prompts(start, draw) -> None:
    mode = start(ThreadedEngine(), step_timeout_seconds=0.1)
    with pytest.raises(EngineError, match=r"rollout.step_timeout_seconds = 0.1; .* first of 6\): 0, 1, 2, 3, 4, 5"):
        take(mode, 1, draw)


def test_uniform_groups_give_their_place_to_the_next(start, draw) -> None:
    engine = ThreadedEngine({0: WRONG, 3: RIGHT})
    mode = start(engine, dynamic_sampling={})
    engine.finish(100)
    first, second = take(mode, 1, draw), take(mode, 2, draw)
    assert rows(first.groups) == [1, 2] and rows(second.groups) == [4, 5]
    assert {0, 3} == set(rows(first.others + second.others))


def test_dynamic_sampling_ends_with_fewer_groups_when_its_limit_is_reached(start, draw) -> None:
    engine = ThreadedEngine(dict.fromkeys(range(1, 64), WRONG))
    mode = start(engine, max_staleness=1, dynamic_sampling={"max_rounds": 3})
    engine.finish(100)
    samples = mode.sample(1, draw, unwatched)
    assert rows(samples.groups) == [0] and samples.metrics["dynamic_sampling/missing_groups"] == 1
