"""How far an evaluation is, and how long it still takes."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from megatron_dsrl.observability.console import duration

LINE_SECONDS = 30.0


class BenchmarkProgress:
    """Counts the samples and finished problems of one benchmark."""

    def __init__(self, title: str, problems: int, done: int, samples_per_prompt: int, show) -> None:
        self._title = title
        self._problems = problems
        self._done = done
        self._to_sample = (problems - done) * samples_per_prompt
        self._sampled = 0
        self._show = show
        self._started = time.monotonic()

    def sampled(self, samples: int) -> None:
        """So many more samples have come back."""
        self._sampled += samples
        self._show(self._line(), self._done)

    def finished(self) -> None:
        """One more problem is judged and on disk."""
        self._done += 1
        self._show(self._line(), self._done)

    def _line(self) -> str:
        left = ""
        if 0 < self._sampled < self._to_sample:
            seconds = (time.monotonic() - self._started) / self._sampled * (self._to_sample - self._sampled)
            left = f", {duration(seconds)} left"
        return f"{self._title}: {self._done} of {self._problems} problems{left}"


@contextmanager
def benchmark_progress(title: str, problems: int, done: int, samples_per_prompt: int) -> Iterator[BenchmarkProgress]:
    """A bar on a terminal; elsewhere a line every half minute, so that a log stays readable."""
    if sys.stdout.isatty():
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=Console(), transient=True) as bar:
            task = bar.add_task(title, total=problems, completed=done)
            yield BenchmarkProgress(
                title,
                problems,
                done,
                samples_per_prompt,
                lambda line, finished: bar.update(task, description=line, completed=finished),
            )
        return
    last = time.monotonic()

    def show(line: str, finished: int) -> None:
        nonlocal last
        if time.monotonic() - last >= LINE_SECONDS:
            print(line, flush=True)
            last = time.monotonic()

    yield BenchmarkProgress(title, problems, done, samples_per_prompt, show)
