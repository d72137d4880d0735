"""How the groups of a training step are sampled: every mode of the `rollout` section, side by side.

| configuration | class | sampling ends when |
|---|---|---|
| default | `WholeBatch` | all prompts of the step are answered |
| `dynamic_sampling` | `UntilMixed` | enough groups are mixed; those still running are aborted and dropped |
| `dynamic_sampling`, `deterministic` | `MixedRounds` | a round is complete and enough groups are mixed |
| `partial_rollouts` | `Partial` | enough groups are finished; the next step continues the others |
| `sample_ahead`, with any of the first three | `Ahead` | as there, but during the training of the previous step |

A run that replays recorded samples (`replay.py`) or learns the responses of a data set (`dataset.py`) uses none of
them.

Dynamic sampling is DAPO's (arXiv 2503.14476, section 3.2): a group whose rewards are all equal has no advantage under a
group baseline, so it is replaced by the next prompt. Which groups finish first depends on timing; deterministic
sampling therefore samples whole rounds, each for the groups still missing. (DAPO's own code samples whole batches.)
"""

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

from megatron_dsrl.common.process import in_background
from megatron_dsrl.config.rollout import RolloutConfig
from megatron_dsrl.data.prompt import Prompt
from megatron_dsrl.data.sampler import RepeatableDraw
from megatron_dsrl.rollout.batch import BatchSampler
from megatron_dsrl.rollout.carry_over import CarryOver
from megatron_dsrl.rollout.dispatcher import EnginesLostError
from megatron_dsrl.rollout.engines.settings import RolloutSettings
from megatron_dsrl.rollout.feed import WholeFeed
from megatron_dsrl.rollout.progress import OnSamples, ignore
from megatron_dsrl.rollout.sample import SampleGroup, count_tokens
from megatron_dsrl.rollout.sample_until import sample_until
from megatron_dsrl.rollout.seeds import seeds_of_batch, stream_of_round
from megatron_dsrl.rollout.unfinished import UnfinishedGroup

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
    """The `dynamic_sampling/*` or `partial_rollouts/*` metrics of the step record."""
    generated_tokens: int = 0
    """Response tokens that the engines produced for this step."""
    seconds: float = 0.0
    """Wall time of sampling, including overlapping verification."""
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

    def start_ahead(self, step: int, draw: Draw, watch: Watch) -> None:
        """Start sampling for this step in the background; only `Ahead` supports it.

        Until `finish_ahead`, the engines must not be used otherwise.
        """
        raise NotImplementedError("only with rollout.sample_ahead")

    def finish_ahead(self) -> None:
        """Wait for the sampling that `start_ahead` started."""
        raise NotImplementedError("only with rollout.sample_ahead")


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


class Ahead(StepSampling):
    """Another mode, run in the background while the previous step is trained on."""

    def __init__(self, mode: StepSampling) -> None:
        self._mode = mode
        self._work: Callable[[], StepSamples] | None = None
        self._running: Future[StepSamples] | None = None
        self._ready: StepSamples | None = None

    @property
    def carried(self) -> CarryOver:
        """The samples of the next step, if they are ready."""
        return CarryOver(finished=tuple(self._ready.groups)) if self._ready else CarryOver()

    @carried.setter
    def carried(self, carried: CarryOver) -> None:
        self._ready = StepSamples(list(carried.finished)) if carried.finished else None

    def start_ahead(self, step: int, draw: Draw, watch: Watch) -> None:
        """Sample in a background thread; the prompts are drawn only once, even if `finish_ahead` samples again."""
        repeatable = RepeatableDraw(draw)
        self._work = lambda: self._mode.sample(step, repeatable.from_the_start(), watch)
        self._running = in_background(self._work)

    def finish_ahead(self) -> None:
        """Wait for the samples. If engines were lost meanwhile, sample again in this thread, which can restart them."""
        assert self._running is not None and self._work is not None
        try:
            self._ready = self._running.result()
        except EnginesLostError:
            self._ready = self._work()  # in the main thread, where engines can be restarted
        self._running = None

    def sample(self, step: int, draw: Draw, watch: Watch) -> StepSamples:
        """The samples that are ready; in the first step of a start none are, so sample now."""
        samples, self._ready = self._ready or self._mode.sample(step, draw, watch), None
        return samples


def step_sampling(config: RolloutSettings, engines: BatchSampler) -> StepSampling:
    """The mode that the configuration asks for."""
    section = config.rollout
    if section.partial_rollouts:
        return Partial(config, engines)
    if section.dynamic_sampling is None:
        mode: StepSampling = WholeBatch(config, engines)
    else:
        mode = MixedRounds(config, engines) if section.deterministic else UntilMixed(config, engines)
    return Ahead(mode) if section.sample_ahead else mode


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
