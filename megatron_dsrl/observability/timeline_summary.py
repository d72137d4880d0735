"""A timeline in figures: seconds of every part of a step on all ranks, how busy the engines were, the longest calls."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

from rich.console import Console
from rich.table import Table

from megatron_dsrl.observability.timeline_records import (
    Interval,
    RankTimeline,
    RecordedCall,
    RecordedSpan,
    RecordedStep,
)

SAMPLING_PART = "generate"
EVALUATION_PART = "evaluate"
SHOWN_CALLS = 5


@dataclass(frozen=True)
class PartFigures:
    """Of a part of steps, or of what is within a part."""

    path: tuple[str, ...]
    mean_seconds: float
    """Per step, over all ranks."""
    worst_rank: int
    worst_rank_seconds: float
    """Per step."""
    longest_seconds: float
    longest_step: int
    longest_rank: int


@dataclass(frozen=True)
class EngineFigures:
    """Of one engine during the steps, evaluations among them."""

    engine: int
    calls: int
    failed_calls: int
    """Neither finished nor aborted because there was enough."""
    tokens: int
    busy_while_sampling: float
    """Share of the seconds of rank 0's `generate` with a call under way."""
    busy: float
    """The same of all seconds of the steps."""
    mean_calls: float
    """Calls under way at a time, while it was busy."""


def parts_of(timelines: Sequence[RankTimeline]) -> list[PartFigures]:
    """The steps themselves (with an empty path) first, then their parts in the order in which they first happened."""
    visits: dict[tuple[str, ...], dict[tuple[int, int], float]] = defaultdict(lambda: defaultdict(float))
    taken: dict[tuple[int, int], RecordedStep] = {}
    for timeline in timelines:
        for number, step in enumerate(timeline.steps):
            taken[timeline.rank, number] = step
            visits[()][timeline.rank, number] = step.when.seconds
        number = 0
        for span in timeline.spans:
            while number < len(timeline.steps) and timeline.steps[number].when.end <= span.when.start:
                number += 1
            if number < len(timeline.steps) and timeline.steps[number].when.holds(span.when.start):
                visits[span.path][timeline.rank, number] += span.when.seconds
    return [_figures(path, seconds, taken) for path, seconds in _parents_first(visits).items()]


def engines_of(first: RankTimeline) -> list[EngineFigures]:
    """Of all engines, from the timeline of rank 0."""
    steps = [step.when for step in first.steps]
    sampling = [span.when for span in first.spans if span.path == (SAMPLING_PART,)]
    by_engine: dict[int, list[RecordedCall]] = defaultdict(list)
    for call in first.calls:
        if any(step.holds(call.when.start) for step in steps):
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
    """Tables of everything."""
    first = min(timelines, key=lambda timeline: timeline.rank)
    console.print(_parts_table(parts_of(timelines), len(timelines), len(first.steps)))
    if first.calls:
        console.print(_engines_table(engines_of(first)))
        console.print(_calls_table(first))
    before = [span for span in first.spans if len(span.path) == 1 and not _is_in_a_step(span, first.steps)]
    if before:
        seconds = ", ".join(f"{span.path[0]} {span.when.seconds:.2f} s" for span in before)
        console.print(f"rank {first.rank} before its first step: {seconds}", soft_wrap=True, highlight=False)
    for timeline in timelines:
        unfinished = [" > ".join(span.path) for span in timeline.spans if not span.finished]
        if unfinished:
            console.print(f"rank {timeline.rank} did not finish {', '.join(unfinished)}", soft_wrap=True)


def _is_in_a_step(span: RecordedSpan, steps: Sequence[RecordedStep]) -> bool:
    return any(step.when.holds(span.when.start) for step in steps)


def _figures(
    path: tuple[str, ...], seconds: dict[tuple[int, int], float], taken: dict[tuple[int, int], RecordedStep]
) -> PartFigures:
    steps_of_rank = defaultdict(int)
    for rank, _ in taken:
        steps_of_rank[rank] += 1
    of_rank = dict.fromkeys(steps_of_rank, 0.0)
    for (rank, _), value in seconds.items():
        of_rank[rank] += value / steps_of_rank[rank]
    worst = max(of_rank, key=of_rank.__getitem__)
    longest = max(seconds, key=seconds.__getitem__)
    return PartFigures(
        path=path,
        mean_seconds=fmean(of_rank.values()),
        worst_rank=worst,
        worst_rank_seconds=of_rank[worst],
        longest_seconds=seconds[longest],
        longest_step=taken[longest].step,
        longest_rank=longest[0],
    )


def _parents_first(visits: dict[tuple[str, ...], dict]) -> dict[tuple[str, ...], dict]:
    """A part, then what is within it; otherwise in the order given."""
    place = {path: number for number, path in enumerate(visits)}

    def order(path: tuple[str, ...]) -> list[int]:
        return [place.get(path[:depth], 0) for depth in range(1, len(path) + 1)]

    return {path: visits[path] for path in sorted(visits, key=order)}


def _engine(
    engine: int, calls: Sequence[RecordedCall], steps: Sequence[Interval], sampling: Sequence[Interval]
) -> EngineFigures:
    under_way = [call.when for call in calls]
    busy = overlap(under_way, steps)
    return EngineFigures(
        engine=engine,
        calls=len(calls),
        failed_calls=sum(call.outcome not in ("done", "aborted") for call in calls),
        tokens=sum(call.tokens for call in calls),
        busy_while_sampling=_share(overlap(under_way, sampling), sum(one.seconds for one in sampling)),
        busy=_share(busy, sum(step.seconds for step in steps)),
        mean_calls=_share(sum(one.seconds for one in under_way), busy),
    )


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _parts_table(parts: Sequence[PartFigures], ranks: int, steps: int) -> Table:
    table = Table(title=f"{steps} steps on {ranks} rank(s): seconds per step")
    table.add_column("part")
    for heading in ("mean", "share", "worst rank", "longest"):
        table.add_column(heading, justify="right")
    of_step = next((part.mean_seconds for part in parts if not part.path), 0.0)
    for part in parts:
        table.add_row(
            "  " * (len(part.path) - 1) + part.path[-1] if part.path else "step",
            f"{part.mean_seconds:.3f}",
            f"{_share(part.mean_seconds, of_step):.1%}",
            f"{part.worst_rank_seconds:.3f} (rank {part.worst_rank})",
            f"{part.longest_seconds:.3f} (step {part.longest_step}, rank {part.longest_rank})",
            style=None if len(part.path) < 2 else "dim",
        )
    return table


def _engines_table(engines: Sequence[EngineFigures]) -> Table:
    table = Table(title="engines during the steps")
    headings = ("engine", "calls", "failed", "tokens", f"busy in {SAMPLING_PART}", "busy in all", "calls at a time")
    for heading in headings:
        table.add_column(heading, justify="right")
    for one in engines:
        shares = (f"{one.busy_while_sampling:.0%}", f"{one.busy:.0%}", f"{one.mean_calls:.1f}")
        table.add_row(str(one.engine), str(one.calls), str(one.failed_calls), f"{one.tokens:,}", *shares)
    return table


def _calls_table(first: RankTimeline) -> Table:
    evaluations = [span.when for span in first.spans if span.path == (EVALUATION_PART,)]
    training = [call for call in first.calls if not any(one.holds(call.when.start) for one in evaluations)]
    table = Table(title="longest calls, without evaluations")
    for heading in ("seconds", "step", "engine", "prompt", "tokens", "attempt", "outcome"):
        table.add_column(heading, justify="left" if heading == "outcome" else "right")
    for call in sorted(training, key=lambda call: -call.when.seconds)[:SHOWN_CALLS]:
        step = next((str(step.step) for step in first.steps if step.when.holds(call.when.start)), "")
        prompt = str(call.prompts[0]) if len(call.prompts) == 1 else f"{len(call.prompts)} of them"
        table.add_row(
            f"{call.when.seconds:.2f}",
            step,
            str(call.engine),
            prompt,
            f"{call.tokens:,}",
            str(call.attempt),
            call.outcome.partition("\n")[0][:60],
        )
    return table
