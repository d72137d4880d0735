"""The timeline of a run in the Trace Event Format of Chrome, which ui.perfetto.dev opens.

A process of the trace is a rank (tracks: steps, and what each thread does) or an engine. An engine has hundreds of
requests at a time: their number is a counter, the longest ones are slices, and failed ones are marks. Times are
microseconds since the first event.

Format: "Trace Event Format" of the Chromium project; used here are complete events (X), counters (C), instants (i) and
metadata (M).
"""

import gzip
import json
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from heapq import nlargest
from itertools import chain
from pathlib import Path
from typing import Any

from megatron_dsrl.common.disk import make_folder_of, replacing
from megatron_dsrl.common.errors import UserError
from megatron_dsrl.observability.timeline import ProfileFile
from megatron_dsrl.report.timeline import Interval, RankTimeline, RecordedCall

STEPS_TRACK = 0
FIRST_ENGINE = 1_000_000
"""Process number of engine 0; ranks have their own."""
FIRST_PROFILE = 2_000_000
PROCESSES_OF_A_RANK = 1000
"""Numbers in the trace that each rank has for the processes of its profiles."""
SHOWN_REQUESTS = 10
"""The longest requests of the run, by engine."""
FIRST_REQUEST_TRACK = 1
FAILED_TRACK = FIRST_REQUEST_TRACK + SHOWN_REQUESTS
IN_FLIGHT = "requests in flight"

TraceEvent = dict[str, Any]
encode = json.JSONEncoder(separators=(",", ":")).encode


def write_trace(timelines: Sequence[RankTimeline], target: Path, profiles: Sequence[ProfileFile] = ()) -> None:
    """Write one file of all ranks and engines, an event per line; with the events of `profiles` by torch.profiler.
    Raises UserError if a profile is damaged."""
    recorded = (block.when for one in timelines for blocks in (one.steps, one.spans, one.calls) for block in blocks)
    origin = min(when.start for when in recorded)
    head = {"displayTimeUnit": "ms", "otherData": {"started": datetime.fromtimestamp(origin, UTC).isoformat()}}
    make_folder_of(target)
    with replacing(target) as file:
        file.write(encode(head)[:-1].encode() + b',"traceEvents":[')
        separator = "\n"
        events = [events_of(timeline, origin) for timeline in timelines]
        for event in chain(*events, *(profile_events(profile, origin) for profile in profiles)):
            file.write((separator + encode(event)).encode())
            separator = ",\n"
        file.write(b"\n]}\n")


def events_of(timeline: RankTimeline, origin: float) -> Iterator[TraceEvent]:
    """Events of a rank and its engines; `origin` is the moment 0 of the trace, in seconds since 1970."""
    rank = timeline.rank
    threads = {name: i for i, name in enumerate(dict.fromkeys(span.thread for span in timeline.spans), start=1)}
    yield _name("process_name", rank, 0, f"rank {rank} ({timeline.host})")
    yield _name("thread_name", rank, STEPS_TRACK, "steps")
    for name, track in threads.items():
        yield _name("thread_name", rank, track, name)
    for step in timeline.steps:
        yield _slice(f"step {step.step}", "step", rank, STEPS_TRACK, step.when, origin, {"step": step.step})
    for span in timeline.spans:
        details = {} if span.finished else {"finished": False}
        yield _slice(span.path[-1], "part", rank, threads[span.thread], span.when, origin, details)
    by_engine: dict[int, list[RecordedCall]] = defaultdict(list)
    for call in timeline.calls:
        by_engine[call.engine].append(call)
    for engine, calls in sorted(by_engine.items()):
        yield from _engine(FIRST_ENGINE + engine, engine, calls, origin)


def rows(intervals: Sequence[Interval]) -> list[int]:
    """For each interval, in order of start, the first row that is free at that time."""
    free_from: list[float] = []
    chosen = []
    for interval in intervals:
        row = next((row for row, free in enumerate(free_from) if free <= interval.start), len(free_from))
        free_from[row : row + 1] = [interval.end]
        chosen.append(row)
    return chosen


def _engine(process: int, number: int, calls: Sequence[RecordedCall], origin: float) -> Iterator[TraceEvent]:
    yield _name("process_name", process, 0, f"engine {number}")
    for moment, requests in _in_flight(calls, origin):
        yield {"name": IN_FLIGHT, "ph": "C", "pid": process, "ts": moment, "args": {"requests": requests}}
    longest = nlargest(SHOWN_REQUESTS, calls, key=lambda call: call.when.seconds)
    longest.sort(key=lambda call: call.when.start)
    drawn_in = rows([call.when for call in longest])
    for row in range(max(drawn_in) + 1):
        yield _name("thread_name", process, FIRST_REQUEST_TRACK + row, f"longest requests {row + 1}")
    for call, row in zip(longest, drawn_in, strict=True):
        yield _slice(_title(call), "call", process, FIRST_REQUEST_TRACK + row, call.when, origin, _details(call))
    failed = [call for call in calls if call.failed]
    if failed:
        yield _name("thread_name", process, FAILED_TRACK, "failed requests")
    for call in failed:
        place = {"pid": process, "tid": FAILED_TRACK, "ts": _microseconds(call.when.end, origin), "s": "t"}
        yield {"name": _title(call), "cat": "failed", "ph": "i", **place, "args": _details(call)}


def _in_flight(calls: Iterable[RecordedCall], origin: float) -> Iterator[tuple[int, int]]:
    """Microsecond, and how many requests the engine has from then on; one entry for each change."""
    changes: dict[int, int] = defaultdict(int)
    for call in calls:
        changes[_microseconds(call.when.start, origin)] += 1
        changes[_microseconds(call.when.end, origin)] -= 1
    requests = 0
    for moment, change in sorted(changes.items()):
        if change:
            requests += change
            yield moment, requests


def _title(call: RecordedCall) -> str:
    return f"prompt {call.prompts[0]}" if len(call.prompts) == 1 else f"{len(call.prompts)} prompts"


def _details(call: RecordedCall) -> dict[str, Any]:
    prompts = ", ".join(map(str, call.prompts))
    return {"prompts": prompts, "tokens": call.tokens, "attempt": call.attempt, "outcome": call.outcome}


def _slice(
    name: str, category: str, process: int, track: int, when: Interval, origin: float, details: dict[str, Any]
) -> TraceEvent:
    """A complete event."""
    start, end = _microseconds(when.start, origin), _microseconds(when.end, origin)
    place = {"pid": process, "tid": track, "ts": start, "dur": end - start}
    return {"name": name, "cat": category, "ph": "X", **place, "args": details}


def _microseconds(moment: float, origin: float) -> int:
    return round((moment - origin) * 1e6)


def _name(what: str, process: int, track: int, name: str) -> TraceEvent:
    return {"name": what, "ph": "M", "pid": process, "tid": track, "args": {"name": name}}


def profile_events(profile: ProfileFile, origin: float) -> Iterator[TraceEvent]:
    """Events of torch.profiler on the clock of the timeline.

    The profiler numbers processes by the system's ids and GPUs by their index, which may be those of ranks. Here they
    are separate processes, named after the rank. Ids of flows (from a call to its kernel) get the rank and step in
    front, because every profile counts its own.

    Source of the format: `baseTimeNanoseconds` is a moment since 1970; a time of an event is in microseconds after it
    (libkineto/src/output_json.cpp). Raises UserError if the file is damaged.
    """
    try:
        with gzip.open(profile.path, "rt", encoding="utf-8") as file:
            trace = json.load(file)
        base, events = trace["baseTimeNanoseconds"], trace["traceEvents"]
    except (OSError, EOFError, ValueError, KeyError, zlib.error) as error:
        raise UserError(f"{profile.path} is damaged ({error}); remove it to see the rest of the trace") from error
    shift = base / 1e3 - origin * 1e6
    numbers: dict[Any, int] = {}
    for event in events:
        number = numbers.setdefault(event["pid"], len(numbers))
        moved = event | {"pid": FIRST_PROFILE + PROCESSES_OF_A_RANK * profile.rank + number}
        if event["ph"] != "M":
            moved["ts"] = round(event["ts"] + shift, 3)
            if "id" in event:
                moved["id"] = f"{profile.rank}.{profile.step}.{event['id']}"
        elif event["name"] == "process_name":
            moved["args"] = {"name": f"rank {profile.rank}, profile: {event['args']['name']}"}
        yield moved
