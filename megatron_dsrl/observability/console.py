"""Console output of a run: one line per step and per evaluation, and progress in between.

On a terminal lines are coloured, fit its width, and a progress bar or a spinner shows what a step is doing; in a file
or a pipe they are plain text of any width, so that a log stays readable. All figures of a step are in metrics.jsonl,
and with `observability.verbose` (`dsrl train -v`) on the console, below its line.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TextIO

from rich.console import Console
from rich.padding import Padding
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from megatron_dsrl.observability.console_lines import (
    details,
    evaluation_details,
    evaluation_parts,
    fitting,
    left,
    step_parts,
)
from megatron_dsrl.observability.records import Record

PHASE_STYLES = ("yellow", "cyan", "green", "magenta")
UNLIMITED = 10**6


class RunConsole:
    """Prints the progress of one run. Only rank 0's prints."""

    def __init__(self, total_steps: int, verbose: bool = False, stream: TextIO | None = None) -> None:
        """
        Args:
            verbose: print every figure of a step.
            stream: standard output by default; whether it is a terminal decides about width, colours and progress bars.
        """
        self._console = Console(file=stream, highlight=False)
        self._total_steps = total_steps
        self._phases: list[str] = []
        self._verbose = verbose
        self._recent_seconds: deque[float] = deque(maxlen=20)

    @contextmanager
    def generation(self, step: int, samples: int) -> Iterator[Callable[[int], None]]:
        """Show samples finished / total while the block generates `samples` responses; gone afterwards.

        Yields:
            A function to call with the number of samples that have just come back.
        """
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(
            *columns, console=self._console, transient=True, disable=not self._console.is_terminal
        ) as progress:
            task = progress.add_task(f"step {step}/{self._total_steps}: samples", total=samples)
            yield partial(progress.advance, task)

    @contextmanager
    def doing(self, step: int, what: str) -> Iterator[None]:
        """Show on a terminal what a step does in the block; gone afterwards."""
        if not self._console.is_terminal:
            yield
            return
        with self._console.status(f"step {step}/{self._total_steps}: {what}", refresh_per_second=2):
            yield

    def step(self, record: Record) -> None:
        """Print the line of one step record. Figures that the record lacks, or holds as null, are left out."""
        if record.get("seconds/step") is not None:
            self._recent_seconds.append(record["seconds/step"])
        phase = record["phase"]
        if phase not in self._phases:
            self._phases.append(phase)
        number = f"step {record['step']:>{len(str(self._total_steps))}}/{self._total_steps} "
        parts = fitting(step_parts(record, self._time_left(record["step"])), self._width - len(number) - len(phase))
        style = PHASE_STYLES[self._phases.index(phase) % len(PHASE_STYLES)]
        self._line(Text.assemble((number, "bold"), (phase, style), *(f"  {part}" for part in parts)))
        self._below(details(record, everything=self._verbose))

    def evaluation(self, record: Record) -> None:
        """Print the line of one evaluation record."""
        self._line(Text("  ".join(fitting(evaluation_parts(record), self._width)), style="bold"))
        if self._verbose:
            self._below([evaluation_details(record)])

    def message(self, text: str) -> None:
        """Print a text between the other lines."""
        self._console.print(Text(text), soft_wrap=not self._console.is_terminal)

    @property
    def _width(self) -> int:
        return self._console.width if self._console.is_terminal else UNLIMITED

    def _line(self, text: Text) -> None:
        self._console.print(text, soft_wrap=True)

    def _below(self, lines: Sequence[str]) -> None:
        for line in lines:
            if self._console.is_terminal:
                self._console.print(Padding(Text(line, style="dim"), (0, 0, 0, 4)))
            else:
                self._line(Text(f"    {line}"))

    def _time_left(self, step: int) -> str:
        if not self._recent_seconds or step >= self._total_steps:
            return ""
        mean_seconds = sum(self._recent_seconds) / len(self._recent_seconds)
        return left((self._total_steps - step) * mean_seconds)
