"""Rank 0's part of a run: choose prompts, sample, keep the rollouts, evaluate, and write down what happened."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_dsrl.actor.statistics import UpdateMetrics
from megatron_dsrl.algorithms.experience import Response
from megatron_dsrl.algorithms.reward_shaping import shaping_metrics
from megatron_dsrl.background import Background
from megatron_dsrl.config.phase import PhaseConfig
from megatron_dsrl.config.rollout import DynamicSamplingConfig
from megatron_dsrl.config.run import RunConfig
from megatron_dsrl.data.prompt import Prompt
from megatron_dsrl.data.sampler import RepeatableDraw
from megatron_dsrl.evaluation.evaluator import Evaluator
from megatron_dsrl.observability.console import RunConsole
from megatron_dsrl.observability.step_metrics import count_tokens, rollout_metrics
from megatron_dsrl.observability.timer import SecondsPerPart
from megatron_dsrl.observability.tracker import Tracker
from megatron_dsrl.rollout.carry_over import CarryOver
from megatron_dsrl.rollout.dispatcher import EnginesLostError
from megatron_dsrl.rollout.dynamic_sampling import dynamic_sampling_metrics, is_mixed, sample_until_mixed
from megatron_dsrl.rollout.enough_groups import EnoughGroups
from megatron_dsrl.rollout.recording import RolloutRecorder
from megatron_dsrl.rollout.replay import replayed_groups
from megatron_dsrl.rollout.rollout import Rollout
from megatron_dsrl.rollout.sample import Group
from megatron_dsrl.step_record import (
    log_prob_gap_warning,
    memory_metrics,
    older_token_metrics,
    scored_spaces,
    update_metrics,
)


@dataclass(frozen=True)
class StepSamples:
    """The rollout of a step."""

    groups: list[Group]
    """What is trained on."""
    others: list[Group]
    """What was sampled to its end besides; only under dynamic sampling."""
    metrics: dict[str, int | float]
    """How dynamic sampling and partial rollouts went; empty without them."""
    generated_tokens: int
    """Response tokens that the engines have produced for it."""
    seconds: float
    """Wall time of sampling, verification included where it overlaps."""

    @property
    def sampled(self) -> list[Group]:
        """All groups."""
        return self.groups + self.others


class Controller:
    """Exists on rank 0 only; the other ranks learn what they need by broadcast."""

    def __init__(
        self,
        config: RunConfig,
        recorder: RolloutRecorder | None,
        prompts: Sequence[Prompt],
        rollout: Rollout,
        evaluator: Evaluator,
        tracker: Tracker,
        console: RunConsole,
    ):
        """
        Args:
            config: the run.
            recorder: keeps the rollouts; None keeps none.
            prompts: the training prompts.
            rollout: where samples come from.
            evaluator: evaluates the held-out sets.
            tracker: writes records.
            console: prints them.
        """
        self._config = config
        self._recorder = recorder
        self._prompts = prompts
        self._rollout = rollout
        self._evaluator = evaluator
        self._tracker = tracker
        self._console = console
        self._carried = CarryOver()
        """What the last step has left to the next one, under partial rollouts."""
        self._work_ahead: Callable[[], StepSamples] | None = None
        self._ahead: Background[StepSamples] | None = None
        self._ready: StepSamples | None = None
        """The next step's samples, where they have been sampled ahead."""

    @property
    def carried(self) -> CarryOver:
        """What must be kept for the next step when no sampling is under way."""
        return CarryOver(finished=tuple(self._ready.groups)) if self._ready else self._carried

    def take_over(self, carried: CarryOver) -> None:
        """Go on with what a checkpoint has kept for the next step."""
        if self._config.rollout.sample_ahead:
            groups = list(carried.finished)
            self._ready = StepSamples(groups, [], {}, 0, 0.0) if groups else None
        else:
            self._carried = carried

    def begin_ahead(self, step: int, draw: Callable[[int], list[int]]) -> None:
        """Sample for a step in the background; `finish_ahead` comes before anything else is asked of the engines."""
        repeatable = RepeatableDraw(draw)
        self._work_ahead = lambda: self._sample(step, repeatable.from_the_start())
        self._ahead = Background(self._work_ahead)

    def finish_ahead(self) -> None:
        """Wait for the background; when its engines were lost, sample here, where they can be replaced."""
        assert self._ahead is not None and self._work_ahead is not None
        try:
            self._ready = self._ahead.result()
        except EnginesLostError:
            self._ready = self._work_ahead()
        self._ahead = None

    def sample(self, step: int, draw: Callable[[int], list[int]]) -> StepSamples:
        """Judged responses to the next prompts; they are on their way to the disk.

        Args:
            step: counted from 1.
            draw: gives the indices of so many further prompts.
        """
        samples, self._ready = self._ready or self._sample(step, draw), None
        if self._recorder:
            self._recorder.record(step, samples.groups, samples.others)
        return samples

    def _sample(self, step: int, draw: Callable[[int], list[int]]) -> StepSamples:
        config, started = self._config.rollout, time.perf_counter()
        if config.replay_from is not None:
            return self._replay(step, draw, Path(config.replay_from))
        if config.partial_rollouts:
            return self._sample_partially(step, draw)
        if config.dynamic_sampling is None:
            groups = self._sample_round(step, 0, draw(config.prompts_per_step))
            return StepSamples(groups, [], {}, count_tokens(groups), time.perf_counter() - started)
        if config.deterministic:
            return self._sample_rounds(step, draw, config.dynamic_sampling)
        return self._sample_until_mixed(step, draw)

    def _replay(self, step: int, draw: Callable[[int], list[int]], run_folder: Path) -> StepSamples:
        """What a recorded run has trained on. A run that goes on from here without it has drawn a batch per step."""
        started = time.perf_counter()
        draw(self._config.rollout.prompts_per_step)
        self._carried = CarryOver()  # what a checkpoint had of it is in the recorded steps
        groups, others = replayed_groups(run_folder, step, self._prompts, self._config.rollout)
        return StepSamples(groups, others, {}, count_tokens(groups + others), time.perf_counter() - started)

    def _sample_rounds(
        self, step: int, draw: Callable[[int], list[int]], config: DynamicSamplingConfig
    ) -> StepSamples:
        """Dynamic sampling that does not depend on which groups are the first."""
        wanted, started = self._config.rollout.prompts_per_step, time.perf_counter()
        batch = sample_until_mixed(lambda n, count: self._sample_round(step, n, draw(count)), wanted, config)
        metrics = {"dynamic_sampling/rounds": batch.rounds}
        metrics |= dynamic_sampling_metrics(batch.kept, batch.others, wanted)
        generated, seconds = count_tokens(batch.kept + batch.others), time.perf_counter() - started
        return StepSamples(batch.kept, batch.others, metrics, generated, seconds)

    def _sample_until_mixed(self, step: int, draw: Callable[[int], list[int]]) -> StepSamples:
        """Dynamic sampling that replaces groups one by one; what is not needed in the end is dropped."""
        started = time.perf_counter()
        batch = self._sample_enough(step, draw, CarryOver())
        others = [*batch.left.finished, *batch.rejected]
        metrics = dynamic_sampling_metrics(batch.accepted, others, self._config.rollout.prompts_per_step)
        metrics["dynamic_sampling/aborted_groups"] = len(batch.left.unfinished)
        return StepSamples(batch.accepted, others, metrics, batch.generated_tokens, time.perf_counter() - started)

    def _sample_enough(self, step: int, draw: Callable[[int], list[int]], carried: CarryOver) -> EnoughGroups:
        config = self._config.rollout
        with self._console.generation(step, config.prompts_per_step * config.samples_per_prompt) as progress:
            return self._rollout.sample_enough(
                step,
                draw=lambda count: [self._prompts[i] for i in draw(count)],
                accept=is_mixed if config.dynamic_sampling else lambda group: True,
                carried=carried,
                on_samples=progress.advance,
            )

    def _sample_partially(self, step: int, draw: Callable[[int], list[int]]) -> StepSamples:
        """Go on with what the step before has left; leave what this one does not need."""
        config, before, started = self._config.rollout, self._carried, time.perf_counter()
        batch = self._sample_enough(step, draw, before)
        self._carried = batch.left  # not before: a step that is interrupted begins again with what it had
        metrics = {
            "partial_rollouts/continued_groups": len(before.finished) + len(before.unfinished) - batch.expired_groups,
            "partial_rollouts/expired_groups": batch.expired_groups,
            "partial_rollouts/left_groups": len(batch.left.finished) + len(batch.left.unfinished),
            "partial_rollouts/left_tokens": batch.left.num_tokens,
            "partial_rollouts/rejected_groups": len(batch.rejected),
            "partial_rollouts/missing_groups": config.prompts_per_step - len(batch.accepted),
        }
        seconds = time.perf_counter() - started
        return StepSamples(batch.accepted, batch.rejected, metrics, batch.generated_tokens, seconds)

    def _sample_round(self, step: int, number: int, indices: Sequence[int]) -> list[Group]:
        prompts = [self._prompts[i] for i in indices]
        with self._console.generation(step, len(prompts) * self._config.rollout.samples_per_prompt) as progress:
            return self._rollout.sample_step(step, prompts, number, on_samples=progress.advance)

    def flush_rollouts(self) -> None:
        """Wait until the rollouts of all steps are on disk."""
        if self._recorder:
            self._recorder.flush()

    def evaluate(self, step: int) -> None:
        """Evaluate the held-out sets after so many steps (0: before training), except for those recorded already."""
        started = time.perf_counter()
        for record in self._evaluator.evaluate(step, except_for=self._tracker.evaluated_sets(step)):
            record["seconds"], started = time.perf_counter() - started, time.perf_counter()
            record["time"] = time.time()
            self._tracker.log_evaluation(record)
            self._console.evaluation(record)

    def record(
        self,
        step: int,
        phase: PhaseConfig,
        samples: StepSamples,
        update: UpdateMetrics | None,
        critic_metrics: dict[str, float],
        timer: SecondsPerPart,
    ) -> None:
        """Write down and print a finished step."""
        config, responses = self._config, responses_of(samples.groups, step)
        record = {
            "step": step,
            "phase": phase.name,
            "space": scored_spaces(phase),
            "weight_version": step,
            "time": time.time(),
            **samples.metrics,
            **rollout_metrics(samples.sampled, samples.generated_tokens, samples.seconds),
            **older_token_metrics(samples.groups, step),
            **shaping_metrics(responses, config.reward.overlong, config.rollout.max_response_tokens),
            **update_metrics(update, phase),
            **critic_metrics,
            **self._rollout.fault_metrics(),
            **memory_metrics(),
            **timer.metrics(),
        }
        self._tracker.log_step(record)
        self._console.step(record)
        if warning := log_prob_gap_warning(record, config.observability.max_log_prob_gap):
            self._console.message(warning)


def responses_of(groups: Sequence[Group], weight_version: int) -> list[Response]:
    """Groups as the algorithms take them, with respect to the weights that they are to update."""
    return [
        Response(
            prompt_ids=group.prompt.token_ids,
            response_ids=sample.response_ids,
            engine_log_probs=sample.log_probs,
            reward=sample.reward,
            group=number,
            truncated=sample.finish_reason == "length",
            older_tokens=sample.tokens_before(weight_version),
            routed_experts=sample.routed_experts,
        )
        for number, group in enumerate(groups)
        for sample in group.samples
    ]
