"""The timeline of a run read back from what its ranks have written, even while it runs or after it was killed, and its
summary: how busy every engine was, and where unfinished ranks are.

Seconds per part of a step are in `metrics.jsonl` (`seconds/*`) and in the report's time table.
"""

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_dsrl.common.errors import UserError
from megatron_dsrl.common.numbers import counted
from megatron_dsrl.observability.records import Record, read_records
from megatron_dsrl.observability.timeline import TRACE_FOLDER

SAMPLING_PART = "generate"


@dataclass(frozen=True)
class Interval:
    """Seconds since 1970."""

    start: float
    end: float

    @property
    def seconds(self) -> float:
        """Length of the interval."""
        return self.end - self.start


class Windows:
    """Intervals that do not overlap, such as the steps of a rank: which moments are in one of them."""

    def __init__(self, intervals: Iterable[Interval]) -> None:
        self._intervals = sorted(intervals, key=lambda interval: interval.start)
        self._starts = [interval.start for interval in self._intervals]

    def hold(self, moment: float) -> bool:
        """Whether one of them holds the moment; takes logarithmic time."""
        number = bisect_right(self._starts, moment) - 1
        return number >= 0 and moment <= self._intervals[number].end


@dataclass(frozen=True)
class RecordedSpan:
    """A block that a rank has executed."""

    path: tuple[str, ...]
    """Names of the spans around it, and its own."""
    thread: str
    when: Interval
    finished: bool
    """False if the process ended in it, or is still in it."""


@dataclass(frozen=True)
class RecordedStep:
    """One execution of a step by a rank; a step repeated after an interruption is there twice."""

    step: int
    when: Interval


@dataclass(frozen=True)
class RecordedCall:
    """See `EngineCall`."""

    engine: int
    when: Interval
    prompts: tuple[int, ...]
    tokens: int
    attempt: int
    outcome: str

    @property
    def failed(self) -> bool:
        """Neither finished nor aborted because there was enough."""
        return self.outcome not in ("done", "aborted")


@dataclass(frozen=True)
class RankTimeline:
    """Events of one rank, in order of time."""

    rank: int
    host: str
    steps: list[RecordedStep]
    spans: list[RecordedSpan]
    calls: list[RecordedCall]
    """Rank 0 only."""


def read_timelines(run_folder: Path) -> list[RankTimeline]:
    """Read the timelines of all ranks. Raises UserError if nothing is recorded, or a file is damaged."""
    if not run_folder.is_dir():
        raise UserError(f"no such folder: {run_folder}; give the folder of a run, <output_dir>/<name>")
    files = sorted((run_folder / TRACE_FOLDER).glob("rank_*.jsonl"))
    timelines = [timeline_of(records) for records in map(read_records, files) if records]
    if not any(one.steps or one.spans or one.calls for one in timelines):
        raise UserError(
            f"{run_folder} holds no timeline ({TRACE_FOLDER}/rank_00000.jsonl ...), or one without an event yet: give "
            "the folder of a run with observability.trace=true"
        )
    return timelines


def timeline_of(records: Sequence[Record]) -> RankTimeline:
    """Timeline of one rank, from its file, which has one part for every start of the run."""
    first = records[0]
    lives = list(_lives(records))
    return RankTimeline(
        rank=first["rank"],
        host=first["host"],
        steps=[step for life in lives for step in _steps(life)],
        spans=sorted((span for life in lives for span in _spans(life)), key=lambda span: span.when.start),
        calls=[_call(record) for record in records if record["event"] == "call"],
    )


def _lives(records: Sequence[Record]) -> Iterator[list[Record]]:
    """The records of each process that the run has had on this rank: one per start."""
    starts = [i for i, record in enumerate(records) if record["event"] == "start"]
    for first, end in zip(starts, [*starts[1:], len(records)], strict=True):
        yield list(records[first:end])


def _end(life: Sequence[Record]) -> float:
    """Time of the last record of a process."""
    return max(record["time"] for record in life)


def _steps(life: Sequence[Record]) -> list[RecordedStep]:
    steps = [record for record in life if record["event"] == "step"]
    moments = [*(record["time"] for record in steps), _end(life)]
    return [RecordedStep(record["step"], Interval(*edges)) for record, edges in zip(steps, pairwise(moments))]


def _spans(life: Sequence[Record]) -> Iterator[RecordedSpan]:
    open_spans: dict[str, list[Record]] = {}
    for record in life:
        if record["event"] not in ("begin", "end"):
            continue
        stack = open_spans.setdefault(record["thread"], [])
        if record["event"] == "begin":
            stack.append(record)
        else:
            yield _span(stack, record["time"], finished=True)
            stack.pop()
    for stack in open_spans.values():
        while stack:
            yield _span(stack, _end(life), finished=False)
            stack.pop()


def _span(stack: Sequence[Record], end: float, finished: bool) -> RecordedSpan:
    """The innermost one."""
    path = tuple(record["name"] for record in stack)
    return RecordedSpan(path, stack[-1]["thread"], Interval(stack[-1]["time"], end), finished)


def _call(record: Record) -> RecordedCall:
    when = Interval(record["time"], record["time"] + record["seconds"])
    prompts, tokens, attempt = tuple(record["prompts"]), record["tokens"], record["attempt"]
    return RecordedCall(record["engine"], when, prompts, tokens, attempt, record["outcome"])


@dataclass(frozen=True)
class EngineFigures:
    """One engine during the steps, evaluations among them."""

    engine: int
    calls: int
    failed_calls: int
    """Neither finished nor aborted because there was enough."""
    tokens: int
    busy_while_sampling: float
    """Share of the seconds of rank 0's `generate` with a call under way."""
    busy: float
    """The same for the total time of the steps."""
    mean_calls: float
    """Calls under way at a time, while it was busy."""


def engines_of(first: RankTimeline) -> list[EngineFigures]:
    """All engines, from the timeline of rank 0."""
    steps = [step.when for step in first.steps]
    sampling = [span.when for span in first.spans if span.path == (SAMPLING_PART,)]
    in_steps, by_engine = Windows(steps), defaultdict(list)
    for call in first.calls:
        if in_steps.hold(call.when.start):
            by_engine[call.engine].append(call)
    return [_engine(engine, calls, steps, sampling) for engine, calls in sorted(by_engine.items())]


def overlap(intervals: Iterable[Interval], windows: Iterable[Interval]) -> float:
    """Seconds that are both in one of the intervals and in one of the windows, however many of each."""
    changes = [
        change
        for kind, group in enumerate((intervals, windows))
        for one in group
        for change in ((one.start, kind, 1), (one.end, kind, -1))
    ]
    inside, seconds, before = [0, 0], 0.0, 0.0
    for moment, kind, sign in sorted(changes):
        if all(inside):
            seconds += moment - before
        inside[kind] += sign
        before = moment
    return seconds


def print_summary(timelines: Sequence[RankTimeline], console: Console) -> None:
    """The engines, what came before the first step, and what did not end."""
    first = min(timelines, key=lambda timeline: timeline.rank)
    console.print(f"{counted(len(first.steps), 'step')} on {counted(len(timelines), 'rank')}", highlight=False)
    if first.calls:
        console.print(_engines_table(engines_of(first)))
    in_steps = Windows([step.when for step in first.steps])
    before = [span for span in first.spans if len(span.path) == 1 and not in_steps.hold(span.when.start)]
    if before:
        seconds = ", ".join(f"{span.path[0]} {span.when.seconds:.2f} s" for span in before)
        console.print(f"rank {first.rank} before its first step: {seconds}", soft_wrap=True, highlight=False)
    for timeline in timelines:
        unfinished = [" > ".join(span.path) for span in timeline.spans if not span.finished]
        if unfinished:
            console.print(f"rank {timeline.rank} did not finish {', '.join(unfinished)}", soft_wrap=True)


def _engine(
    engine: int, calls: Sequence[RecordedCall], steps: Sequence[Interval], sampling: Sequence[Interval]
) -> EngineFigures:
    under_way = [call.when for call in calls]
    busy = overlap(under_way, steps)
    return EngineFigures(
        engine=engine,
        calls=len(calls),
        failed_calls=sum(call.failed for call in calls),
        tokens=sum(call.tokens for call in calls),
        busy_while_sampling=_share(overlap(under_way, sampling), sum(one.seconds for one in sampling)),
        busy=_share(busy, sum(step.seconds for step in steps)),
        mean_calls=_share(sum(one.seconds for one in under_way), busy),
    )


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _engines_table(engines: Sequence[EngineFigures]) -> Table:
    table = Table(title="engines during the steps")
    headings = ("engine", "calls", "failed", "tokens", f"busy in {SAMPLING_PART}", "busy in all", "calls at a time")
    for heading in headings:
        table.add_column(heading, justify="right")
    for one in engines:
        shares = (f"{one.busy_while_sampling:.0%}", f"{one.busy:.0%}", f"{one.mean_calls:.1f}")
        table.add_row(str(one.engine), str(one.calls), str(one.failed_calls), f"{one.tokens:,}", *shares)
    return table
