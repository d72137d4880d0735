"""Console output of a run: one line per step and per evaluation, and progress in between.

On a terminal lines are coloured, fit its width, and a progress bar or a spinner shows what a step is doing; in a file
or a pipe they are plain text of any width, so that a log stays readable. All figures of a step are in metrics.jsonl,
and with `observability.verbose` (`dsrl train -v`) on the console, below its line. What the words mean is explained in
examples/run_folder/README.md ("The console").
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

from megatron_dsrl.observability.records import Record

PHASE_STYLES = ("yellow", "cyan", "green", "magenta")
UNLIMITED = 10**6

Part = tuple[str, int]
"""Words, and their rank: if a line is too long, the parts of the highest rank are left out first."""


class RunConsole:
    """Prints the progress of one run, on rank 0 only."""

    def __init__(self, total_steps: int, verbose: bool = False, stream: TextIO | None = None) -> None:
        """
        Args:
            verbose: print every figure of a step.
            stream: standard output by default; whether it is a terminal decides width, colours and progress bars.
        """
        self._console = Console(file=stream, highlight=False)
        self._total_steps = total_steps
        self._phases: list[str] = []
        self._verbose = verbose
        self._recent_seconds: deque[float] = deque(maxlen=20)

    @contextmanager
    def generation(self, step: int, samples: int) -> Iterator[Callable[[int], None]]:
        """Show samples finished / total while the block generates `samples` responses; removed afterwards. Yields a
        function to call with the number of samples that have just come back."""
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(
            *columns, console=self._console, transient=True, disable=not self._console.is_terminal
        ) as progress:
            task = progress.add_task(f"step {step}/{self._total_steps}: samples", total=samples)
            yield partial(progress.advance, task)

    @contextmanager
    def doing(self, step: int, what: str) -> Iterator[None]:
        """Show on a terminal what a step does in the block; removed afterwards."""
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


def step_parts(record: Record, time_left: str) -> list[Part]:
    """The figures that say whether a run learns, in the order in which they are read."""
    seconds = _short_seconds(record, "seconds/step")
    parts = [
        (_formatted(record, "reward {:.3f}", "reward/mean"), 1),
        # comparable from step to step only if the responses come from a data set
        (_formatted(record, "loss {:.4f}", "policy/loss") if "data/epoch" in record else "", 1),
        (_formatted(record, "epoch {:.2f}", "data/epoch"), 4),
        (_mixed(record), 4),
        (_formatted(record, "len {:,.0f}", "response/mean_tokens"), 2),
        (_truncated(record, "response/truncated_fraction"), 3),
        (_gap(record), 5),
        (_formatted(record, "prompt gap {:.2f}", "pre_train/mean_log_prob_gap"), 5),
        (", ".join(part for part in (seconds, time_left) if part), 0),
    ]
    return [part for part in parts if part[0]]


def details(record: Record, everything: bool) -> list[str]:
    """Lines below a step's: failures of the verifier, if any, and all other figures on request."""
    lines = [_fallbacks(record), *(_failures(record, kind) for kind in ("timeouts", "errors"))]
    if everything:
        groups = _formatted(
            record,
            "groups: {} solved, {} mixed, {} unsolved",
            "reward/solved_groups",
            "reward/mixed_groups",
            "reward/unsolved_groups",
        )
        figures = [
            _formatted(record, "{:.1%} truncated", "response/truncated_fraction"),
            _formatted(record, "entropy {:.3f}", "response/conditional_entropy"),
            _formatted(record, "gradient norm {:.3g}", "policy/grad_norm"),
            _formatted(record, "learning rate {:.3g}", "policy/learning_rate"),
            _formatted(record, "{:,.0f} tokens/s", "throughput/tokens_per_second"),
        ]
        lines += [groups, ", ".join(figure for figure in figures if figure), _seconds(record)]
    return [line for line in lines if line]


def evaluation_parts(record: Record) -> list[Part]:
    """Parts of an evaluation's line, the set and its result first."""
    result = _formatted(record, "{:.1%} ± {:.1%}", "accuracy", "standard_error") or "accuracy unknown"
    if "loss" in record:
        result = _formatted(record, "loss {:.4f} ± {:.4f}", "loss", "loss_standard_error") or f"loss {record['loss']}"
    parts = [
        (f"evaluation after step {record['step']}: {record['set']} {result}", 0),
        (_formatted(record, "len {:,.0f}", "mean_tokens"), 1),
        (_truncated(record, "truncated_fraction"), 2),
        (_short_seconds(record, "seconds"), 3),
    ]
    return [part for part in parts if part[0]]


def evaluation_details(record: Record) -> str:
    """What accuracy or loss is averaged over."""
    if "loss" in record:
        return _formatted(record, "{:,} responses, {:,} tokens", "responses", "tokens")
    return _formatted(record, "{} problems x {} samples", "problems", "samples_per_prompt")


def fitting(parts: Sequence[Part], width: int) -> list[str]:
    """The words of as many parts as fit, with two spaces before each; at least those of the lowest rank."""
    kept = list(parts)
    while len(kept) > 1 and sum(len(words) + 2 for words, _ in kept) > width:
        kept.remove(max(kept, key=lambda part: part[1]))
    return [words for words, _ in kept]


def duration(seconds: float) -> str:
    """A duration in at most two units: `42 s`, `3 min 20 s`, `5 h 12 min`, `2 d 3 h`."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60} s"
    if seconds < 86400:
        return f"{seconds // 3600} h {seconds % 3600 // 60} min"
    return f"{seconds // 86400} d {seconds % 86400 // 3600} h"


def left(seconds: float) -> str:
    """The remaining time in the largest unit of which it has two: `90 s left`, `37 min left`, `18 h left`."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit} left"
    return f"{seconds:.0f} s left"


def _formatted(record: Record, template: str, *keys: str) -> str:
    values = [record.get(key) for key in keys]
    return "" if None in values else template.format(*values)


def _short_seconds(record: Record, key: str) -> str:
    seconds = record.get(key)
    return "" if seconds is None else f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:,.0f} s"


def _mixed(record: Record) -> str:
    """Mixed groups, the ones with a gradient, out of all."""
    keys = [f"reward/{kind}_groups" for kind in ("solved", "mixed", "unsolved")]
    if any(record.get(key) is None for key in keys):
        return ""
    return f"mixed {record[keys[1]]}/{sum(record[key] for key in keys)}"


def _truncated(record: Record, key: str) -> str:
    return f"cut {record[key]:.0%}" if record.get(key) else ""


def _gap(record: Record) -> str:
    """One digit is enough to see whether it is rounding."""
    gap = record.get("mismatch/mean_log_prob_gap")
    if gap is None:
        return ""
    digit, _, exponent = f"{gap:.0e}".partition("e")
    return f"gap {digit}e{int(exponent)}" if gap else "gap 0"


def _seconds(record: Record) -> str:
    parts = [
        f"{key.removeprefix('seconds/').replace('_', ' ')} {value:.1f}"
        for key, value in record.items()
        if key.startswith("seconds/") and key != "seconds/step" and value is not None
    ]
    return f"seconds: {', '.join(parts)}" if parts else ""


def _fallbacks(record: Record) -> str:
    count = record.get("reward/verifier_fallbacks")
    return f"{count} rewards from the fallback of the verifier, which gave none" if count else ""


def _failures(record: Record, kind: str) -> str:
    count = record.get(f"reward/verifier_{kind}")
    return f"{count} verifier {kind}, which scored 0; see examples/troubleshooting: rewards" if count else ""
