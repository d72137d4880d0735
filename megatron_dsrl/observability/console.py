"""What a run prints: one line per step and per evaluation, and a progress bar while a step generates.

On a terminal the lines are coloured and long generations show how many samples are finished; in a file or a pipe
they are plain text, without a progress bar, so that a log stays readable.
"""

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

from megatron_dsrl.observability.records import Record

PHASE_STYLES = ("yellow", "cyan", "green", "magenta")


class GenerationProgress:
    """Counts the finished samples of one step."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress = progress
        self._task = task

    def advance(self, samples: int = 1) -> None:
        """So many more samples are finished."""
        self._progress.advance(self._task, samples)


class RunConsole:
    """Prints the progress of one run. Only rank 0's prints."""

    def __init__(self, total_steps: int, stream: TextIO | None = None) -> None:
        """`stream` defaults to standard output; whether it is a terminal decides about colours and progress bars."""
        self._console = Console(file=stream, highlight=False, soft_wrap=True)
        self._total_steps = total_steps
        self._recent_seconds: deque[float] = deque(maxlen=20)
        self._phases: list[str] = []

    @contextmanager
    def generation(self, step: int, samples: int) -> Iterator[GenerationProgress]:
        """Show samples finished / total while the block generates `samples` responses; gone afterwards."""
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(
            *columns, console=self._console, transient=True, disable=not self._console.is_terminal
        ) as progress:
            task = progress.add_task(f"step {step}/{self._total_steps}: samples", total=samples)
            yield GenerationProgress(progress, task)

    def step(self, record: Record) -> None:
        """Print the line of one step record. Keys that the record lacks, or holds as null, are left out."""
        if record.get("seconds/step") is not None:
            self._recent_seconds.append(record["seconds/step"])
        line = Text(f"step {record['step']:>{len(str(self._total_steps))}}/{self._total_steps} ", style="bold")
        line.append(record["phase"], style=self._phase_style(record["phase"]))
        for part in (*step_parts(record), *self._time_left(record["step"])):
            line.append(" | ", style="dim").append(part, style="not bold")
        self._console.print(line)

    def evaluation(self, record: Record) -> None:
        """Print the line of one evaluation record."""
        self._console.print(Text(evaluation_line(record), style="bold"))

    def message(self, text: str) -> None:
        """Print a line of one's own between the others."""
        self._console.print(Text(text))

    def _phase_style(self, phase: str) -> str:
        if phase not in self._phases:
            self._phases.append(phase)
        return PHASE_STYLES[self._phases.index(phase) % len(PHASE_STYLES)]

    def _time_left(self, step: int) -> list[str]:
        if not self._recent_seconds or step >= self._total_steps:
            return []
        mean_seconds = sum(self._recent_seconds) / len(self._recent_seconds)
        return [f"{duration((self._total_steps - step) * mean_seconds)} left"]


def step_parts(record: Record) -> list[str]:
    """The figures of a step record in words, in the order in which a researcher looks at them."""
    parts = [
        _formatted(record, "reward {:.3f}", "reward/mean"),
        _formatted(
            record,
            "groups {} solved {} mixed {} unsolved",
            "reward/solved_groups",
            "reward/mixed_groups",
            "reward/unsolved_groups",
        ),
        _formatted(record, "{:.0f} tokens, {:.1%} truncated", "response/mean_tokens", "response/truncated_fraction"),
        _formatted(record, "entropy {:.3f}", "response/conditional_entropy"),
        _formatted(record, "log-prob gap {:.2g}", "mismatch/mean_log_prob_gap"),
        _formatted(record, "prompt gap {:.3f}", "pre_train/mean_log_prob_gap"),
        _formatted(record, "grad norm {:.3g}", "policy/grad_norm"),
        _formatted(record, "{:,.0f} tokens/s", "throughput/tokens_per_second"),
        _seconds(record),
        *(_failures(record, kind) for kind in ("timeouts", "errors")),
    ]
    return [part for part in parts if part]


def evaluation_line(record: Record) -> str:
    """An evaluation record in words."""
    parts = [
        _formatted(record, "{:.1%} ± {:.1%}", "accuracy", "standard_error") or "accuracy unknown",
        _formatted(record, "{} problems x {} samples", "problems", "samples_per_prompt"),
        _formatted(record, "{:.0f} tokens, {:.1%} truncated", "mean_tokens", "truncated_fraction"),
    ]
    return f"evaluation after step {record['step']}: {record['set']} " + " | ".join(part for part in parts if part)


def duration(seconds: float) -> str:
    """Seconds in words of at most two units: `42 s`, `3 min 20 s`, `5 h 12 min`, `2 d 3 h`."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60} s"
    if seconds < 86400:
        return f"{seconds // 3600} h {seconds % 3600 // 60} min"
    return f"{seconds // 86400} d {seconds % 86400 // 3600} h"


def _formatted(record: Record, template: str, *keys: str) -> str:
    values = [record.get(key) for key in keys]
    return "" if None in values else template.format(*values)


def _seconds(record: Record) -> str:
    total = record.get("seconds/step")
    if total is None:
        return ""
    parts = [
        f"{key.removeprefix('seconds/').replace('_', ' ')} {value:.1f}"
        for key, value in record.items()
        if key.startswith("seconds/") and key != "seconds/step" and value is not None
    ]
    return f"{total:.1f} s" + (f" ({', '.join(parts)})" if parts else "")


def _failures(record: Record, kind: str) -> str:
    count = record.get(f"reward/verifier_{kind}")
    return f"{count} verifier {kind}" if count else ""
