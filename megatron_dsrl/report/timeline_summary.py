"""Summary of the timeline: how busy every engine was, and where unfinished ranks are.

Seconds per part of a step are in `metrics.jsonl` (`seconds/*`) and in the report's time table.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from megatron_dsrl.report.timeline_records import Interval, RankTimeline, RecordedCall, Windows

SAMPLING_PART = "generate"


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
    console.print(f"{len(first.steps)} steps on {len(timelines)} rank(s)", highlight=False)
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
