"""How the groups of a training step are sampled: every mode of the `rollout` section, side by side.

| configuration | class | sampling ends when |
|---|---|---|
| default | `WholeBatch` | all prompts of the step are answered |
| `dynamic_sampling` | `UntilMixed` | enough groups are mixed; those still running are aborted and dropped |
| `dynamic_sampling`, `deterministic` | `MixedRounds` | a round is complete and enough groups are mixed |
| `partial_rollouts` | `Partial` | enough groups are finished; the next step continues the others |
| `max_staleness`, also with `dynamic_sampling` | `Asynchronous` | never; a step takes the oldest groups |

A run that replays recorded samples or learns the responses of a data set (`without_engines.py`) uses none of them.

Dynamic sampling is DAPO's (arXiv 2503.14476, section 3.2): a group whose rewards are all equal has no advantage under a
group baseline, so it is replaced by the next prompt. Which groups finish first depends on timing; deterministic
sampling therefore samples whole rounds, each for the groups still missing. (DAPO's own code samples whole batches.)
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_dsrl.config.rollout import RolloutConfig
from megatron_dsrl.config.run import RolloutSettings
from megatron_dsrl.data.prompt import Prompt
from megatron_dsrl.rollout.asynchronous import Asynchronous
from megatron_dsrl.rollout.batch import BatchSampler, OnSamples, WholeFeed, ignore
from megatron_dsrl.rollout.rollout import Draw, StepSamples, StepSampling, Watch, dynamic_sampling_metrics, unwatched
from megatron_dsrl.rollout.sample import SampleGroup, count_tokens
from megatron_dsrl.rollout.seeds import seeds_of_batch, stream_of_round
from megatron_dsrl.rollout.unfinished import CarryOver, UnfinishedGroup, new_groups, restart_expired


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
                (groups if group.rewards_differ and len(groups) < wanted else others).append(group)
            if len(groups) == wanted:
                break
        metrics = {"dynamic_sampling/rounds": number + 1} | dynamic_sampling_metrics(groups, others, wanted)
        return StepSamples(groups, others, metrics, count_tokens(groups + others), time.perf_counter() - started)


class UntilMixed(StepSampling):
    """Dynamic sampling that replaces groups one by one and aborts those not needed in the end."""

    def sample(self, step: int, draw: Draw, watch: Watch) -> StepSamples:
        started = time.perf_counter()
        with watch(step, self._config.rollout.samples_per_step) as on_samples:
            batch = sample_until(self._config, self._engines, step, draw, self._accepts, CarryOver(), on_samples)
        others = [*batch.left.finished, *batch.rejected]
        metrics = dynamic_sampling_metrics(batch.accepted, others, self._config.rollout.prompts_per_step)
        metrics["dynamic_sampling/aborted_groups"] = len(batch.left.unfinished)
        return StepSamples(batch.accepted, others, metrics, batch.generated_tokens, time.perf_counter() - started)


class Partial(StepSampling):
    """Continues what the previous step left, and leaves to the next step what this one does not need."""

    def sample(self, step: int, draw: Draw, watch: Watch) -> StepSamples:
        before, started = self.carried, time.perf_counter()
        with watch(step, self._config.rollout.samples_per_step) as on_samples:
            batch = sample_until(self._config, self._engines, step, draw, self._accepts, before, on_samples)
        metrics: dict[str, int | float] = {
            "partial_rollouts/continued_groups": len(before.finished) + len(before.unfinished) - batch.expired_groups,
            "partial_rollouts/expired_groups": batch.expired_groups,
            "partial_rollouts/left_groups": len(batch.left.finished) + len(batch.left.unfinished),
            "partial_rollouts/left_tokens": batch.left.num_tokens,
            "partial_rollouts/rejected_groups": len(batch.rejected),
            "partial_rollouts/missing_groups": self._config.rollout.prompts_per_step - len(batch.accepted),
        }
        seconds = time.perf_counter() - started

        def leave() -> None:
            self.carried = batch.left

        return StepSamples(batch.accepted, batch.rejected, metrics, batch.generated_tokens, seconds, commit=leave)


def step_sampling(config: RolloutSettings, engines: BatchSampler, last_step: int | None = None) -> StepSampling:
    """The mode that the configuration asks for. `last_step` is the run's last one; None: no end."""
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
    """Sample all groups of a step's batch `number`, from 0; one group per prompt, in the order of the prompts."""
    count, stream = config.rollout.samples_per_prompt, stream_of_round(step, number)
    seeds = seeds_of_batch(config.seed, stream, prompts, count)
    feed = WholeFeed(new_groups(prompts, seeds))
    with watch(step, len(prompts) * count) as on_samples:
        return engines.sample_batch(feed, engines.training_sampling, on_samples).finished_groups


@dataclass(frozen=True)
class SampledUntil:
    """The result of a batch that ends when it has enough groups."""

    accepted: list[SampleGroup]
    """In the order in which they were started; fewer than the step takes if its limit was reached first."""
    rejected: list[SampleGroup]
    left: CarryOver
    """Groups that the step does not need: accepted beyond its number, or aborted."""
    expired_groups: int
    """Carried-over groups that were restarted because they would have mixed too many weight versions."""
    generated_tokens: int
    """Response tokens that the engines produced in this step."""


def sample_until(
    config: RolloutSettings,
    engines: BatchSampler,
    step: int,
    draw: Draw,
    accept: Callable[[SampleGroup], bool],
    carried: CarryOver,
    on_samples: OnSamples = ignore,
) -> SampledUntil:
    """Continue what the previous step left, start new prompts, and stop once `prompts_per_step` groups are accepted.

    Prompts whose group is not accepted are replaced at once. When there are enough groups, those still in flight are
    aborted, which favours short responses unless the next step continues them.
    """
    section, seen = config.rollout, Counter[int]()
    assert not section.deterministic, "which groups come first depends on timing"

    def seeds(prompts: Sequence[Prompt]) -> list[tuple[int, ...]]:
        return seeds_of_batch(config.seed, stream_of_round(step, 0), prompts, section.samples_per_prompt, seen)

    def start(number: int) -> list[UnfinishedGroup]:
        prompts = draw(number)
        return new_groups(prompts, seeds(prompts))

    versions = section.partial_rollouts.max_weight_versions if section.partial_rollouts else 1
    carried, expired = restart_expired(carried, engines.weight_version, versions, seeds)
    feed = UntilEnough(section, accept, start, carried)
    batch = engines.sample_batch(feed, engines.training_sampling, on_samples)

    positions = {id(group): position for position, group in batch.finished.items()}
    # groups finished in the previous step come first
    accepted = sorted(feed.accepted[: section.prompts_per_step], key=lambda group: positions.get(id(group), -1))
    left = CarryOver(tuple(feed.accepted[section.prompts_per_step :]), tuple(batch.unfinished_groups))
    everything = CarryOver((*feed.accepted, *feed.rejected), left.unfinished)
    return SampledUntil(accepted, feed.rejected, left, expired, everything.num_tokens - carried.num_tokens)


class UntilEnough:
    """Feeds a batch until enough of its groups are accepted. Which ones these are depends on timing."""

    wake = None

    def __init__(
        self,
        section: RolloutConfig,
        accept: Callable[[SampleGroup], bool],
        start: Callable[[int], list[UnfinishedGroup]],
        carried: CarryOver,
    ) -> None:
        """`start(n)` returns n groups with the next prompts; `carried` is what the previous step left."""
        self.accepted: list[SampleGroup] = []
        self.rejected: list[SampleGroup] = []
        self._wanted, self._oversampling = section.prompts_per_step, section.oversampling
        rounds = section.dynamic_sampling.max_rounds if section.dynamic_sampling else 1
        self._may_start = math.ceil(self._wanted * self._oversampling) * rounds
        """Number of new groups left; without any, the batch ends with fewer than wanted."""
        self._accept = accept
        self._start = start
        self._to_continue = list(carried.unfinished)
        for group in carried.finished:
            self._sort(group)

    def take(self, in_flight: int) -> list[UnfinishedGroup]:
        """Carried-over groups first, then as many new ones as keep enough in flight."""
        groups, self._to_continue = self._to_continue, []
        missing = math.ceil((self._wanted - len(self.accepted)) * self._oversampling) - in_flight - len(groups)
        count = min(missing, self._may_start)
        if count > 0:
            self._may_start -= count
            groups += self._start(count)
        return groups

    def judged(self, position: int, group: SampleGroup) -> None:
        self._sort(group)

    def is_enough(self) -> bool:
        return len(self.accepted) >= self._wanted

    def _sort(self, group: SampleGroup) -> None:
        (self.accepted if self._accept(group) else self.rejected).append(group)
