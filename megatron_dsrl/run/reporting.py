"""What a run shows and records of its steps: timeline and terminal on every rank, records on rank 0."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from megatron_dsrl.actor.statistics import UpdateMetrics
from megatron_dsrl.common.collective import on_first, rank
from megatron_dsrl.config.phase import PhaseConfig
from megatron_dsrl.config.run import RunConfig
from megatron_dsrl.observability.console import RunConsole
from megatron_dsrl.observability.profiler import StepProfiler
from megatron_dsrl.observability.records import Record
from megatron_dsrl.observability.timeline import Timeline
from megatron_dsrl.observability.timer import SecondsPerPart
from megatron_dsrl.observability.tracker import Tracker
from megatron_dsrl.rollout.rollout import Rollout, StepSamples
from megatron_dsrl.run.results import closing_lines
from megatron_dsrl.run.step_record import log_prob_gap_warning, step_record


@dataclass(frozen=True)
class Reporting:
    """Tells the user what a run does."""

    config: RunConfig
    run_folder: Path
    rollout: Rollout
    """Its engines' metrics are recorded."""
    tracker: Tracker | None
    """Rank 0 only."""
    timeline: Timeline
    profiler: StepProfiler
    console: RunConsole

    def start_step(self, step: int) -> SecondsPerPart:
        """The timer of a step that starts now; its parts are shown and recorded."""
        self.timeline.start_step(step)
        return SecondsPerPart(span=partial(self._doing, step))

    def record(
        self,
        step: int,
        phase: PhaseConfig,
        samples: StepSamples | None,
        update: UpdateMetrics | None,
        metrics: dict[str, float],
        timer: SecondsPerPart,
    ) -> None:
        """Record and print a finished step on rank 0. Collective.

        Args:
            samples: rank 0's.
            update: None if the policy was not updated.
            metrics: further ones, by full name.

        Raises:
            UserError: rank 0 cannot write, because the disk is full for instance. Raised on all ranks.
        """

        def record() -> None:
            assert self.tracker is not None and samples is not None
            further = metrics | self.rollout.engine_metrics() | timer.metrics()
            record = step_record(self.config, step, phase, samples, update, further)
            self.tracker.log_step(record)
            self.console.step(record)
            if warning := log_prob_gap_warning(record, self.config.observability.max_log_prob_gap):
                self.console.message(warning)

        on_first(record)

    def evaluated_sets(self, step: int) -> set[str]:
        """Names of the held-out sets whose evaluation after this step is recorded. Rank 0 only."""
        assert self.tracker is not None
        return self.tracker.evaluated_sets(step)

    def record_evaluation(self, record: Record, started: float, responses: Sequence[Record] = ()) -> None:
        """Record and print an evaluation of one set, begun at this `perf_counter`, with some of its responses. Rank 0
        only."""
        assert self.tracker is not None
        record = {**record, "seconds": time.perf_counter() - started, "time": time.time()}
        self.tracker.log_evaluation(record, responses)
        self.console.evaluation(record)

    def finish(self, last_step: int) -> None:
        """Rank 0: say where the results are."""
        if rank() == 0:
            self.console.message("\n".join(closing_lines(self.run_folder, last_step)))

    @contextmanager
    def _doing(self, step: int, part: str) -> Iterator[None]:
        """Record a part of a step in the timeline, and show it on rank 0's terminal (sampling has its own bar)."""
        shown = rank() == 0 and part != "generate"
        with self.timeline.span(part), self.console.doing(step, part.replace("_", " ")) if shown else nullcontext():
            yield
