"""Progress of an evaluation, with an estimate of the remaining time."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from megatron_dsrl.observability.console_lines import duration

LINE_SECONDS = 30.0


class BenchmarkProgress:
    """Counts the samples and finished problems of one benchmark."""

    def __init__(self, title: str, problems: int, done: int, to_sample: int, show: Callable[[str, int], None]) -> None:
        """`show` gets the progress line and the number of finished problems; see `benchmark_progress` for the rest."""
        self._title = title
        self._problems = problems
        self._done = done
        self._to_sample = to_sample
        self._sampled = 0
        self._show = show
        self._started = time.monotonic()

    def sampled(self, problem_is_done: bool) -> None:
        """Count one more sample that is judged and on disk."""
        self._sampled += 1
        self._done += problem_is_done
        self._show(self._line(), self._done)

    def _line(self) -> str:
        left = ""
        if 0 < self._sampled < self._to_sample:
            seconds = (time.monotonic() - self._started) / self._sampled * (self._to_sample - self._sampled)
            left = f", {duration(seconds)} left"
        return f"{self._title}: {self._done} of {self._problems} problems{left}"


@contextmanager
def benchmark_progress(title: str, problems: int, done: int, to_sample: int) -> Iterator[BenchmarkProgress]:
    """A bar on a terminal; elsewhere a line every half minute, to keep logs readable.

    Args:
        done: number of problems that have all their samples.
        to_sample: number of samples that are missing.
    """
    if sys.stdout.isatty():
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=Console(), transient=True) as bar:
            task = bar.add_task(title, total=problems, completed=done)

            def update(line: str, finished: int) -> None:
                bar.update(task, description=line, completed=finished)

            yield BenchmarkProgress(title, problems, done, to_sample, update)
        return
    last = time.monotonic()

    def show(line: str, finished: int) -> None:
        nonlocal last
        if time.monotonic() - last >= LINE_SECONDS:
            print(line, flush=True)
            last = time.monotonic()

    yield BenchmarkProgress(title, problems, done, to_sample, show)
