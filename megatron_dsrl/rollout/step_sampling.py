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
from collections.abc import Sequence

from megatron_dsrl.config.run import RolloutSettings
from megatron_dsrl.data.prompt import Prompt
from megatron_dsrl.rollout.asynchronous import Asynchronous
from megatron_dsrl.rollout.batch import BatchSampler
from megatron_dsrl.rollout.carry_over import CarryOver
from megatron_dsrl.rollout.feed import WholeFeed
from megatron_dsrl.rollout.sample import SampleGroup, count_tokens
from megatron_dsrl.rollout.sample_until import sample_until
from megatron_dsrl.rollout.seeds import seeds_of_batch, stream_of_round
from megatron_dsrl.rollout.step_samples import (
    Draw,
    StepSamples,
    StepSampling,
    Watch,
    dynamic_sampling_metrics,
    is_mixed,
    samples_per_step,
    unwatched,
)
from megatron_dsrl.rollout.unfinished import new_groups


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
    feed = WholeFeed(new_groups(prompts, seeds))
    with watch(step, len(prompts) * count) as on_samples:
        return engines.sample_batch(feed, engines.training_sampling, on_samples).finished_groups
