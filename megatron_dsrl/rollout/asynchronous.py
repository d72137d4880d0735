"""Sampling that goes on while the policy is updated (`rollout.max_staleness`)."""

import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future, wait

from megatron_dsrl.common.background import in_background
from megatron_dsrl.config.run import RolloutSettings
from megatron_dsrl.rollout.batch import BatchSampler, OnSamples, RolloutBatch, ignore
from megatron_dsrl.rollout.engines.errors import EngineError, EnginesLostError
from megatron_dsrl.rollout.group_queue import GroupQueue
from megatron_dsrl.rollout.rollout import Draw, StepSamples, StepSampling, Watch, dynamic_sampling_metrics
from megatron_dsrl.rollout.sample import SampleGroup, count_tokens
from megatron_dsrl.rollout.seeds import seeds_of_batch, stream_of_round
from megatron_dsrl.rollout.unfinished import CarryOver, UnfinishedGroup, new_groups

POLL_SECONDS = 0.5
CLOSE_SECONDS = 10.0
"""Limit for aborting what is in flight at the end."""
LATE_PROMPTS_IN_ERROR = 8


class Asynchronous(StepSampling):
    """Samples in the background all the time; a step takes the groups that were started first. See `GroupQueue`.

    Only `sample` draws prompts, so that the state of the sampler always matches what is left.
    """

    def __init__(self, config: RolloutSettings, engines: BatchSampler, last_step: int | None = None) -> None:
        """Nothing is sampled beyond `last_step`; None: no end."""
        super().__init__(config, engines)
        section = config.rollout
        self._wanted, self._max_staleness = section.prompts_per_step, section.max_staleness
        self._last_step = last_step
        self._queue = GroupQueue(self._accepts)
        self._restored: CarryOver | None = None
        self._running: Future[RolloutBatch] | None = None
        self._began: float | None = None

    @property
    def carried(self) -> CarryOver:
        """What is in the queue; for groups in flight only the prompt and the seeds."""
        return self._restored or self._queue.left

    @carried.setter
    def carried(self, carried: CarryOver) -> None:
        self._restored = carried

    def sample(self, step: int, draw: Draw, watch: Watch) -> StepSamples:
        """Wait for the step's groups, which may be finished already."""
        began = time.perf_counter() if self._began is None else self._began
        if self._restored is not None:
            self._restore(step, self._restored)
        steps_ahead = self._max_staleness
        if self._last_step is not None:
            steps_ahead = min(steps_ahead, max(0, self._last_step - step))
        supply = _Supply(self._config, step, draw, self._queue, self._wanted * (1 + steps_ahead))
        with watch(step, self._config.rollout.samples_per_step) as on_samples:
            self._wait(supply, on_samples)
        groups, others = self._queue.next_step(self._wanted)
        metrics = staleness_metrics(groups, step)
        assert metrics["asynchronous/max_staleness"] <= self._max_staleness, metrics
        if self._config.rollout.dynamic_sampling:
            metrics |= dynamic_sampling_metrics(groups, others, self._wanted)
        self._began = time.perf_counter()
        metrics["asynchronous/finished_groups"] = self._queue.num_finished - len(groups)
        metrics["asynchronous/unfinished_groups"] = len(self._queue.unfinished)
        return StepSamples(
            groups,
            others,
            metrics,
            count_tokens(groups + others),
            self._began - began,
            commit=lambda: self._queue.take_step(len(groups), len(others), self._wanted),
        )

    def close(self) -> None:
        """Abort what is in flight."""
        if self._running is not None:
            self._queue.close()
            wait([self._running], CLOSE_SECONDS)

    def _wait(self, supply: "_Supply", on_samples: OnSamples) -> None:
        """Wait until the step's groups are finished. Raises EngineError if they are not within the step's limit, or
        sampling has failed."""
        limit, shown = self._config.rollout.step_timeout_seconds, 0
        deadline = time.monotonic() + limit
        while True:
            changes = self._queue.changes
            may_grow = supply.fill()
            deadline += self._keep_running()
            finished = self._queue.finished_of_next(self._wanted)
            if finished > shown:
                on_samples((finished - shown) * self._config.rollout.samples_per_prompt)
                shown = finished
            if finished == self._wanted or (not may_grow and finished == self._queue.size):
                return
            if time.monotonic() > deadline:
                late = [group.prompt.index for group in self._queue.unfinished[:LATE_PROMPTS_IN_ERROR]]
                raise EngineError(
                    f"generation took longer than rollout.step_timeout_seconds = {limit:g}; not finished (prompts by "
                    f"index, the first of {len(self._queue.unfinished)}): {', '.join(map(str, late))}"
                )
            self._queue.wait(changes, POLL_SECONDS)

    def _keep_running(self) -> float:
        """Sample in the background, after a loss of all engines again. Returns the seconds that a restart took. Raises
        EngineError if sampling has failed in another way."""
        if self._running is not None and not self._running.done():
            return 0.0
        begin = time.monotonic()
        if self._running is not None:
            try:
                self._running.result()
            except EnginesLostError:
                self._engines.recover_engines()
            self._queue.begin_again()
        sampling = self._engines.training_sampling
        self._running = in_background(lambda: self._engines.sample_batch(self._queue, sampling, ignore))
        self._running.add_done_callback(lambda _: self._queue.notify())
        return time.monotonic() - begin

    def _restore(self, step: int, carried: CarryOver) -> None:
        """Continue with a checkpoint's groups. Those that would get too old start over: the bound may be lower now."""
        fresh: list[SampleGroup] = []
        expired: list[SampleGroup] = []
        for group in carried.finished:
            is_in_time = step + len(fresh) // self._wanted - group.oldest_version <= self._max_staleness
            (fresh if is_in_time or not self._accepts(group) else expired).append(group)
        prompts = [group.prompt for group in expired]
        seeds = seeds_of_batch(
            self._config.seed, stream_of_round(step, 1), prompts, self._config.rollout.samples_per_prompt
        )
        unfinished = new_groups(prompts, seeds)
        for left in carried.unfinished:
            unfinished.append(UnfinishedGroup.new(left.prompt, [response.seed for response in left.responses]))
        self._queue.restore(fresh, unfinished)
        self._restored = None


class _Supply:
    """Fills the queue with prompts during one step."""

    def __init__(self, config: RolloutSettings, step: int, draw: Draw, queue: GroupQueue, places: int) -> None:
        """Opens the queue for `places` groups."""
        self._config, self._step, self._draw, self._queue, self._places = config, step, draw, queue, places
        dynamic, wanted = config.rollout.dynamic_sampling, config.rollout.prompts_per_step
        # while the trainer updates, nothing is drawn: uniform groups are then replaced from a step's spare prompts
        self._target = places + (wanted if dynamic else 0)
        self._left = max(0, self._target - queue.size) + ((dynamic.max_rounds - 1) * wanted if dynamic else 0)
        self._seen = Counter[int]()
        queue.open(places)

    def fill(self) -> bool:
        """Add what is missing; returns whether more may be added later."""
        missing = min(self._target - self._queue.size, self._left)
        if missing > 0:
            prompts = self._draw(missing)
            self._left -= missing
            stream = stream_of_round(self._step, 0)
            seeds = seeds_of_batch(
                self._config.seed, stream, prompts, self._config.rollout.samples_per_prompt, self._seen
            )
            self._queue.add(new_groups(prompts, seeds))
        return self._left > 0


def staleness_metrics(groups: Sequence[SampleGroup], step: int) -> dict[str, int | float]:
    """Staleness of a step's samples: the number of steps between the weights that drew the first token and those that
    are being updated."""
    ages = [step - sample.oldest_version for group in groups for sample in group.samples]
    return {
        "asynchronous/mean_staleness": sum(ages) / len(ages) if ages else 0.0,
        "asynchronous/max_staleness": max(ages, default=0),
    }
