"""Rank 0's duties other than sampling: show progress, record steps, evaluate."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from megatron_dsrl.actor.statistics import UpdateMetrics
from megatron_dsrl.algorithms.reward_shaping import shaping_metrics
from megatron_dsrl.config.data import OverlongConfig
from megatron_dsrl.config.phase import PhaseConfig
from megatron_dsrl.config.run import ObservabilityConfig
from megatron_dsrl.evaluation.evaluator import Evaluator
from megatron_dsrl.evaluation.sample_file import first_responses
from megatron_dsrl.observability.console import RunConsole
from megatron_dsrl.observability.records import Record
from megatron_dsrl.observability.timer import SecondsPerPart
from megatron_dsrl.observability.tracker import Tracker
from megatron_dsrl.rollout.progress import OnSamples
from megatron_dsrl.rollout.recording import RolloutRecorder
from megatron_dsrl.rollout.responses import responses_of
from megatron_dsrl.rollout.rollout import Rollout
from megatron_dsrl.rollout.step_samples import StepSamples
from megatron_dsrl.run import step_record
from megatron_dsrl.run.step_metrics import response_metrics, rollout_metrics


class Controller:
    """Exists on rank 0 only; the other ranks get what they need by broadcast."""

    def __init__(
        self,
        observability: ObservabilityConfig,
        overlong: OverlongConfig | None,
        max_response_tokens: int,
        recorder: RolloutRecorder | None,
        rollout: Rollout,
        evaluator: Evaluator,
        tracker: Tracker,
        console: RunConsole,
    ) -> None:
        """
        Args:
            overlong: penalty of overlong responses, for its metrics; None: no penalty.
            max_response_tokens: length limit of responses.
            recorder: saves the rollouts; None saves none.
        """
        self._observability = observability
        self._overlong = overlong
        self._max_response_tokens = max_response_tokens
        self._recorder = recorder
        self._rollout = rollout
        self._evaluator = evaluator
        self._tracker = tracker
        self._console = console

    @contextmanager
    def show_progress(self, step: int, samples: int) -> Iterator[OnSamples]:
        """Context that shows how many of a step's samples have come back."""
        with self._console.generation(step, samples) as progress:
            yield progress.advance

    def keep(self, step: int, samples: StepSamples) -> None:
        """Start to write the rollouts of a step to disk."""
        if self._recorder:
            self._recorder.record(step, samples.groups, samples.others)

    def flush_rollouts(self) -> None:
        """Wait until the rollouts of all steps are on disk."""
        if self._recorder:
            self._recorder.flush()

    def evaluate(self, step: int) -> None:
        """Evaluate the held-out sets after this step (0: before training), except those already recorded."""
        started = time.perf_counter()
        for evaluation in self._evaluator.evaluate(step, except_for=self._tracker.evaluated_sets(step)):
            shown = first_responses(evaluation.problems, self._observability.evaluation_responses)
            self.record_evaluation(evaluation.record, started, shown)
            started = time.perf_counter()

    def evaluated_sets(self, step: int) -> set[str]:
        """Names of the held-out sets whose evaluation after this step is recorded."""
        return self._tracker.evaluated_sets(step)

    def record(
        self,
        step: int,
        phase: PhaseConfig,
        samples: StepSamples,
        update: UpdateMetrics | None,
        critic_metrics: dict[str, float],
        timer: SecondsPerPart,
    ) -> None:
        """Record and print a finished step."""
        responses = responses_of(samples.groups, step)
        record = {
            "step": step,
            "phase": phase.name,
            "space": step_record.scored_spaces(phase),
            "weight_version": step,
            "time": time.time(),
            **samples.metrics,
            **_metrics_of_samples(samples),
            **step_record.older_token_metrics(samples.groups, step),
            **shaping_metrics(responses, self._overlong, self._max_response_tokens),
            **step_record.update_metrics(update, phase),
            **critic_metrics,
            **self._rollout.engine_metrics(),
            **step_record.memory_metrics(),
            **timer.metrics(),
        }
        self._tracker.log_step(record)
        self._console.step(record)
        if warning := step_record.log_prob_gap_warning(record, self._observability.max_log_prob_gap):
            self._console.message(warning)

    def record_evaluation(self, record: Record, started: float, responses: Sequence[Record] = ()) -> None:
        """Record and print an evaluation of one set, begun at this `perf_counter`, with some of its responses."""
        record = {**record, "seconds": time.perf_counter() - started, "time": time.time()}
        self._tracker.log_evaluation(record, responses)
        self._console.evaluation(record)


def _metrics_of_samples(samples: StepSamples) -> dict[str, int | float]:
    if not samples.judged:
        return response_metrics([sample for group in samples.groups for sample in group.samples])
    return rollout_metrics(samples.sampled, samples.generated_tokens, samples.seconds)
