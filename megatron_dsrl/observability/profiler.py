"""Profiles of chosen steps: `<run folder>/trace/profile_rank_00000_step_000003.json.gz`, one per rank and step.

torch.profiler records PyTorch's operations, and on a GPU its kernels, in the Trace Event Format of Chrome. `dsrl trace`
puts them on the clock of the timeline (report/trace_events.py). With Nsight Systems nothing is written here: the
profiled steps are the range that `nsys profile --capture-range=cudaProfilerApi` captures.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity

from megatron_dsrl.common.errors import UserError
from megatron_dsrl.observability.timeline import profile_file
from megatron_dsrl.platform import current_platform


class StepProfiler:
    """Profiles this rank during chosen steps."""

    def __init__(
        self, steps: Collection[int], run_folder: Path, rank: int, nsight: bool, report: Callable[[str], None]
    ) -> None:
        """Raise UserError if Nsight Systems is to capture, but CUDA is missing.

        Args:
            nsight: start and stop Nsight Systems' capture instead of profiling with PyTorch.
            report: gets a line for each profile that could not be written.
        """
        if nsight and steps and current_platform().name != "cuda":
            raise UserError(
                "observability.profile_with=nsight needs a CUDA device; on a CPU use observability.profile_with=torch"
            )
        self._steps = frozenset(steps)
        self._run_folder = run_folder
        self._rank = rank
        self._nsight = nsight
        self._report = report

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Profile the block if the step is one of those chosen; a step that fails leaves no profile."""
        if number not in self._steps:
            yield
        elif self._nsight:
            with torch.cuda.profiler.profile():
                yield
        else:
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if current_platform().name == "cuda" else [])]
            with torch.profiler.profile(activities=activities) as profiler:
                yield
            self._write(profiler, profile_file(self._run_folder, self._rank, number))

    def _write(self, profiler: torch.profiler.profile, file: Path) -> None:
        try:
            file.parent.mkdir(exist_ok=True)
            file.unlink(missing_ok=True)  # of the same step before an interruption
            profiler.export_chrome_trace(str(file))
        except (OSError, RuntimeError) as error:
            self._report(f"warning: no profile of this step: {file}: {error}")
