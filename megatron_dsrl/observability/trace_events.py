"""The timeline of a run in the Trace Event Format of Chrome, which ui.perfetto.dev opens.

A process of the trace is a rank (tracks: steps, and what each thread does) or an engine. Calls to one engine overlap;
each is drawn in the first row that is free. Times are microseconds since the first event.
"""

import json
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from megatron_dsrl.observability.timeline_records import Interval, RankTimeline, RecordedCall, RecordedSpan

STEPS_TRACK = 0
FIRST_ENGINE = 1_000_000
"""Process number of engine 0; ranks have their own."""

TraceEvent = dict[str, Any]


def write_trace(timelines: Sequence[RankTimeline], target: Path) -> None:
    """Write one file of all ranks and engines."""
    origin = min(moment for timeline in timelines for moment in _beginnings(timeline))
    started = datetime.fromtimestamp(origin, UTC).isoformat()
    trace = {
        "traceEvents": [event for timeline in timelines for event in events_of(timeline, origin)],
        "displayTimeUnit": "ms",
        "otherData": {"started": started},
    }
    target.write_text(json.dumps(trace), encoding="utf-8")


def events_of(timeline: RankTimeline, origin: float) -> list[TraceEvent]:
    """
    Args:
        timeline: of one rank.
        origin: the moment 0 of the trace, in seconds since 1970.
    """
    rank = timeline.rank
    threads = {name: i for i, name in enumerate(dict.fromkeys(span.thread for span in timeline.spans), start=1)}
    events = [
        _name("process_name", rank, 0, f"rank {rank} ({timeline.host})"),
        _name("thread_name", rank, STEPS_TRACK, "steps"),
        *(_name("thread_name", rank, track, name) for name, track in threads.items()),
    ]
    events += [
        _slice(f"step {step.step}", "step", rank, STEPS_TRACK, step.when, origin, {"step": step.step})
        for step in timeline.steps
    ]
    events += [_span(span, rank, threads[span.thread], origin) for span in timeline.spans]
    for engine in sorted({call.engine for call in timeline.calls}):
        events += _engine(engine, [call for call in timeline.calls if call.engine == engine], origin)
    return events


def rows(intervals: Sequence[Interval]) -> list[int]:
    """For each interval the first row in which nothing else is drawn at that time. Ascending by their starts."""
    free_from: list[float] = []
    chosen = []
    for interval in intervals:
        row = next((row for row, free in enumerate(free_from) if free <= interval.start), len(free_from))
        free_from[row : row + 1] = [interval.end]
        chosen.append(row)
    return chosen


def _engine(number: int, calls: Iterable[RecordedCall], origin: float) -> list[TraceEvent]:
    calls = sorted(calls, key=lambda call: call.when.start)
    process = FIRST_ENGINE + number
    drawn_in = rows([call.when for call in calls])
    events = [_name("process_name", process, 0, f"engine {number}")]
    events += [_name("thread_name", process, row, f"call {row + 1}") for row in range(max(drawn_in) + 1)]
    for call, row in zip(calls, drawn_in, strict=True):
        prompts = ", ".join(map(str, call.prompts))
        details = {"prompts": prompts, "tokens": call.tokens, "attempt": call.attempt, "outcome": call.outcome}
        name = f"prompt {prompts}" if len(call.prompts) == 1 else f"{len(call.prompts)} prompts"
        events.append(_slice(name, "call", process, row, call.when, origin, details))
    return events


def _span(span: RecordedSpan, rank: int, track: int, origin: float) -> TraceEvent:
    details = {} if span.finished else {"finished": False}
    return _slice(span.path[-1], "part", rank, track, span.when, origin, details)


def _slice(
    name: str, category: str, process: int, track: int, when: Interval, origin: float, details: dict[str, Any]
) -> TraceEvent:
    """A complete event."""
    start = round((when.start - origin) * 1e6)
    end = round((when.end - origin) * 1e6)
    place = {"pid": process, "tid": track, "ts": start, "dur": end - start}
    return {"name": name, "cat": category, "ph": "X", **place, "args": details}


def _name(what: str, process: int, track: int, name: str) -> TraceEvent:
    return {"name": what, "ph": "M", "pid": process, "tid": track, "args": {"name": name}}


def _beginnings(timeline: RankTimeline) -> list[float]:
    return [one.when.start for one in (*timeline.steps, *timeline.spans, *timeline.calls)]
