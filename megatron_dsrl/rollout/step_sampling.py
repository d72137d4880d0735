"""How the groups of a training step are sampled: every mode of the `rollout` section, side by side.

| configuration | class | sampling ends when |
|---|---|---|
| default | `WholeBatch` | all prompts of the step are answered |
| `dynamic_sampling` | `UntilMixed` | enough groups are mixed; those still running are aborted and dropped |
| `dynamic_sampling`, `deterministic` | `MixedRounds` | a round is complete and enough groups are mixed |
| `partial_rollouts` | `Partial` | enough groups are finished; the next step continues the others |
| `max_staleness`, also with `dynamic_sampling` | `Asynchronous` | never; a step takes the oldest groups |

A run that replays recorded samples (`replay.py`) or learns the responses of a data set (`dataset.py`) uses none of
them.

Dynamic sampling is DAPO's (arXiv 2503.14476, section 3.2): a group whose rewards are all equal has no advantage under a
group baseline, so it is replaced by the next prompt. Which groups finish first depends on timing; deterministic
sampling therefore samples whole rounds, each for the groups still missing. (DAPO's own code samples whole batches.)
"""

import math
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

from megatron_dsrl.common.process import in_background
from megatron_dsrl.config.rollout import RolloutConfig
from megatron_dsrl.data.prompt import Prompt
from megatron_dsrl.rollout.batch import BatchSampler, RolloutBatch
from megatron_dsrl.rollout.carry_over import CarryOver
from megatron_dsrl.rollout.dispatcher import EnginesLostError
from megatron_dsrl.rollout.engines.errors import EngineError
from megatron_dsrl.rollout.engines.settings import RolloutSettings
from megatron_dsrl.rollout.feed import WholeFeed
from megatron_dsrl.rollout.group_queue import GroupQueue
from megatron_dsrl.rollout.progress import OnSamples, ignore
from megatron_dsrl.rollout.sample import SampleGroup, count_tokens
from megatron_dsrl.rollout.sample_until import sample_until
from megatron_dsrl.rollout.seeds import seeds_of_batch, stream_of_round
from megatron_dsrl.rollout.unfinished import UnfinishedGroup

POLL_SECONDS = 0.5
CLOSE_SECONDS = 10.0
"""Limit for aborting what is in flight at the end."""
LATE_PROMPTS_IN_ERROR = 8

Draw = Callable[[int], Sequence[Prompt]]
"""draw(n) returns the next n prompts."""
Watch = Callable[[int, int], AbstractContextManager[OnSamples]]
"""watch(step, n) is a context that shows the progress of n samples for this step."""


def unwatched(step: int, samples: int) -> AbstractContextManager[OnSamples]:
    """A `Watch` that shows nothing."""
    return nullcontext(ignore)


@dataclass(frozen=True)
class StepSamples:
    """The rollout of a step."""

    groups: list[SampleGroup]
    """The groups to train on."""
    others: list[SampleGroup] = field(default_factory=list)
    """Completed groups that are not trained on (dynamic sampling and partial rollouts only)."""
    metrics: dict[str, int | float] = field(default_factory=dict)
    """The `dynamic_sampling/*`, `partial_rollouts/*` or `asynchronous/*` metrics of the step record."""
    generated_tokens: int = 0
    """Response tokens that the engines produced for this step."""
    seconds: float = 0.0
    """Wall time of sampling, including overlapping verification; asynchronously, the time since the last step's."""
    judged: bool = True
    """Whether a verifier has scored the samples; not those of a data set."""

    @property
    def sampled(self) -> list[SampleGroup]:
        """All completed groups."""
        return self.groups + self.others


class StepSampling(ABC):
    """One way to sample the groups of a step."""

    def __init__(self, config: RolloutSettings, engines: BatchSampler) -> None:
        self._config = config
        self._engines = engines
        self.carried = CarryOver()
        """State from the last step for the next one. Saved in checkpoints; set when a run resumes."""

    @abstractmethod
    def sample(self, step: int, draw: Draw, watch: Watch) -> StepSamples:
        """The judged groups of a step, counted from 1."""

    def close(self) -> None:  # noqa: B027
        """End what runs in the background; most modes have nothing to end."""


class WholeBatch(StepSampling):
    """Starts all groups of the step at once."""

    def sample(self, step: int, draw: Draw, watch: Watch) -> StepSamples:
        started = time.perf_counter()
        prompts = draw(self._config.rollout.prompts_per_step)
        groups = sample_round(self._config, self._engines, step, 0, prompts, watch)
        return StepSamples(groups, generated_tokens=count_tokens(groups), seconds=time.perf_counter() - started)


class MixedRounds(StepSampling):
    """Dynamic sampling independent of timing: rounds until enough groups are mixed, or no round is left."""

    def sample(self, step: int, draw: Draw, watch: Watch) -> StepSamples:
        wanted, dynamic = self._config.rollout.prompts_per_step, self._config.rollout.dynamic_sampling
        assert dynamic is not None
        started = time.perf_counter()
        groups: list[SampleGroup] = []
        others: list[SampleGroup] = []
        for number in range(dynamic.max_rounds):
            prompts = draw(math.ceil((wanted - len(groups)) * dynamic.oversampling))
            for group in sample_round(self._config, self._engines, step, number, prompts, watch):
                (groups if is_mixed(group) and len(groups) < wanted else others).append(group)
            if len(groups) == wanted:
                break
        metrics = {"dynamic_sampling/rounds": number + 1} | dynamic_sampling_metrics(groups, others, wanted)
        return StepSamples(groups, others, metrics, count_tokens(groups + others), time.perf_counter() - started)


class UntilMixed(StepSampling):
    """Dynamic sampling that replaces groups one by one and aborts those not needed in the end."""

    def sample(self, step: int, draw: Draw, watch: Watch) -> StepSamples:
        started = time.perf_counter()
        with watch(step, samples_per_step(self._config.rollout)) as on_samples:
            batch = sample_until(self._config, self._engines, step, draw, is_mixed, CarryOver(), on_samples)
        others = [*batch.left.finished, *batch.rejected]
        metrics = dynamic_sampling_metrics(batch.accepted, others, self._config.rollout.prompts_per_step)
        metrics["dynamic_sampling/aborted_groups"] = len(batch.left.unfinished)
        return StepSamples(batch.accepted, others, metrics, batch.generated_tokens, time.perf_counter() - started)


class Partial(StepSampling):
    """Continues what the previous step left, and leaves to the next step what this one does not need."""

    def sample(self, step: int, draw: Draw, watch: Watch) -> StepSamples:
        before, started = self.carried, time.perf_counter()
        accept = is_mixed if self._config.rollout.dynamic_sampling else lambda group: True
        with watch(step, samples_per_step(self._config.rollout)) as on_samples:
            batch = sample_until(self._config, self._engines, step, draw, accept, before, on_samples)
        self.carried = batch.left  # only now: an interrupted step starts over with what it had
        metrics: dict[str, int | float] = {
            "partial_rollouts/continued_groups": len(before.finished) + len(before.unfinished) - batch.expired_groups,
            "partial_rollouts/expired_groups": batch.expired_groups,
            "partial_rollouts/left_groups": len(batch.left.finished) + len(batch.left.unfinished),
            "partial_rollouts/left_tokens": batch.left.num_tokens,
            "partial_rollouts/rejected_groups": len(batch.rejected),
            "partial_rollouts/missing_groups": self._config.rollout.prompts_per_step - len(batch.accepted),
        }
        seconds = time.perf_counter() - started
        return StepSamples(batch.accepted, batch.rejected, metrics, batch.generated_tokens, seconds)


class Asynchronous(StepSampling):
    """Samples in the background all the time; a step takes the groups that were begun first. See `GroupQueue`.

    Only `sample` draws prompts, so that the state of the sampler always fits what is left.
    """

    def __init__(self, config: RolloutSettings, engines: BatchSampler, last_step: int | None = None) -> None:
        """
        Args:
            config: numbers of prompts and samples, the bound on staleness, and limits.
            engines: where groups are sampled.
            last_step: last step of the run, beyond which nothing is sampled; None: no end.
        """
        super().__init__(config, engines)
        section = config.rollout
        self._wanted, self._max_staleness = section.prompts_per_step, section.max_staleness
        self._last_step = last_step
        self._queue = GroupQueue(is_mixed if section.dynamic_sampling else lambda group: True)
        self._restored: CarryOver | None = None
        self._running: Future[RolloutBatch] | None = None
        self._began: float | None = None

    @property
    def carried(self) -> CarryOver:
        """What is in the queue; of groups in flight only the prompt and the seeds."""
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
        with watch(step, samples_per_step(self._config.rollout)) as on_samples:
            self._wait(supply, on_samples)
        groups, others = self._queue.next_step(self._wanted)
        metrics = staleness_metrics(groups, step)
        assert metrics["asynchronous/max_staleness"] <= self._max_staleness, metrics
        if self._config.rollout.dynamic_sampling:
            metrics |= dynamic_sampling_metrics(groups, others, self._wanted)
        self._began = time.perf_counter()
        # only now: an interrupted step leaves all groups where they are
        self._queue.take_step(len(groups), len(others), self._wanted)
        metrics["asynchronous/finished_groups"] = self._queue.num_finished
        metrics["asynchronous/unfinished_groups"] = len(self._queue.unfinished)
        return StepSamples(groups, others, metrics, count_tokens(groups + others), self._began - began)

    def close(self) -> None:
        """Abort what is in flight."""
        if self._running is not None:
            self._queue.close()
            wait([self._running], CLOSE_SECONDS)

    def _wait(self, supply: "_Supply", on_samples: OnSamples) -> None:
        """Wait until the step's groups are finished.

        Raises:
            EngineError: they are not within the step's limit, or sampling has failed.
        """
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
        """Sample in the background, after a loss of all engines again. Returns the seconds that a restart took.

        Raises:
            EngineError: sampling has failed in another way.
        """
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
        """Go on with a checkpoint's groups. Those that would get too old start over: the bound may be lower now."""
        fresh: list[SampleGroup] = []
        expired: list[SampleGroup] = []
        for group in carried.finished:
            is_in_time = step + len(fresh) // self._wanted - group.oldest_version <= self._max_staleness
            (fresh if is_in_time else expired).append(group)
        prompts = [group.prompt for group in expired]
        seeds = seeds_of_batch(
            self._config.seed, stream_of_round(step, 1), prompts, self._config.rollout.samples_per_prompt
        )
        unfinished = [UnfinishedGroup.new(*pair) for pair in zip(prompts, seeds, strict=True)]
        for left in carried.unfinished:
            unfinished.append(UnfinishedGroup.new(left.prompt, [response.seed for response in left.responses]))
        self._queue.restore(fresh, unfinished)
        self._restored = None


class _Supply:
    """Fills the queue with prompts during one step."""

    def __init__(self, config: RolloutSettings, step: int, draw: Draw, queue: GroupQueue, places: int) -> None:
        """
        Args:
            config: numbers of prompts and samples, and how many groups dynamic sampling may replace.
            step: counted from 1; names the random numbers.
            draw: where prompts come from.
            queue: is opened for `places` groups.
            places: number of groups.
        """
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
            self._queue.add([UnfinishedGroup.new(*pair) for pair in zip(prompts, seeds, strict=True)])
        return self._left > 0


def step_sampling(config: RolloutSettings, engines: BatchSampler, last_step: int | None = None) -> StepSampling:
    """The mode that the configuration asks for.

    Args:
        config: of the run.
        engines: where it samples.
        last_step: its last step; None: no end.
    """
    section = config.rollout
    if section.max_staleness:
        return Asynchronous(config, engines, last_step)
    if section.partial_rollouts:
        return Partial(config, engines)
    if section.dynamic_sampling is None:
        return WholeBatch(config, engines)
    return MixedRounds(config, engines) if section.deterministic else UntilMixed(config, engines)


def sample_round(
    config: RolloutSettings,
    engines: BatchSampler,
    step: int,
    number: int,
    prompts: Sequence[Prompt],
    watch: Watch = unwatched,
) -> list[SampleGroup]:
    """Sample one batch of a step and wait for all of it.

    Args:
        config: has the number of samples per prompt and the run's seed.
        engines: where the batch is sampled.
        step: counted from 1.
        number: number of the batch within the step, from 0.
        watch: shows progress.

    Returns:
        One group per prompt, in the order of the prompts.
    """
    count, stream = config.rollout.samples_per_prompt, stream_of_round(step, number)
    seeds = seeds_of_batch(config.seed, stream, prompts, count)
    feed = WholeFeed([UnfinishedGroup.new(*pair) for pair in zip(prompts, seeds, strict=True)])
    with watch(step, len(prompts) * count) as on_samples:
        return engines.sample_batch(feed, engines.training_sampling, on_samples).finished_groups


def samples_per_step(config: RolloutConfig) -> int:
    """Number of responses that a step trains on."""
    return config.prompts_per_step * config.samples_per_prompt


def is_mixed(group: SampleGroup) -> bool:
    """Whether the samples of a group have different rewards."""
    return len({sample.reward for sample in group.samples}) > 1


def dynamic_sampling_metrics(
    kept: Sequence[SampleGroup], others: Sequence[SampleGroup], wanted: int
) -> dict[str, int | float]:
    """The `dynamic_sampling/*` metrics that `MixedRounds` and `UntilMixed` have in common.

    Args:
        kept: the groups that are trained on.
        others: completed groups that are not.
        wanted: number of groups that the batch should have.
    """
    return {
        "dynamic_sampling/sampled_groups": len(kept) + len(others),
        "dynamic_sampling/surplus_groups": sum(map(is_mixed, others)),
        "dynamic_sampling/missing_groups": wanted - len(kept),
    }


def staleness_metrics(groups: Sequence[SampleGroup], step: int) -> dict[str, int | float]:
    """Staleness of a step's samples: the number of steps between the weights that drew the first token and those that
    are being updated."""
    ages = [step - sample.oldest_version for group in groups for sample in group.samples]
    return {
        "asynchronous/mean_staleness": sum(ages) / len(ages) if ages else 0.0,
        "asynchronous/max_staleness": max(ages, default=0),
    }
