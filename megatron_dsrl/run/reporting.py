"""What a run shows and records of its steps: timeline and terminal on every rank, records on rank 0."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from megatron_dsrl.actor.statistics import UpdateMetrics
from megatron_dsrl.common.collective import on_first
from megatron_dsrl.config.phase import PhaseConfig
from megatron_dsrl.observability.console import RunConsole
from megatron_dsrl.observability.profiler import StepProfiler
from megatron_dsrl.observability.timeline import NoTimeline, Timeline
from megatron_dsrl.observability.timer import SecondsPerPart
from megatron_dsrl.rollout.step_samples import StepSamples
from megatron_dsrl.run.controller import Controller
from megatron_dsrl.run.results import closing_lines


@dataclass(frozen=True)
class Reporting:
    """Tells the user what a run does."""

    run_folder: Path
    controller: Controller | None
    """Rank 0 only."""
    timeline: Timeline | NoTimeline
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
            assert self.controller is not None and samples is not None
            self.controller.record(step, phase, samples, update, metrics, timer)

        on_first(record)

    def finish(self, last_step: int) -> None:
        """Rank 0: say where the results are."""
        if self.controller is not None:
            self.console.message("\n".join(closing_lines(self.run_folder, last_step)))

    @contextmanager
    def _doing(self, step: int, part: str) -> Iterator[None]:
        """Record a part of a step in the timeline, and show it on rank 0's terminal (sampling has its own bar)."""
        shown = self.controller is not None and part != "generate"
        with self.timeline.span(part), self.console.doing(step, part.replace("_", " ")) if shown else nullcontext():
            yield
