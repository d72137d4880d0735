"""Timelines as ranks leave them behind (those of real runs are in tests/test_train.py), and seconds per part."""

import json
import signal
import subprocess
import sys
import time
from itertools import pairwise

import pytest
from rich.console import Console

from megatron_dsrl.common.errors import UserError
from megatron_dsrl.observability.timeline import EngineCall, SecondsPerPart, Timeline, trace_file
from megatron_dsrl.report.timeline import (
    Interval,
    Windows,
    engines_of,
    overlap,
    print_summary,
    read_timelines,
    timeline_of,
)
from megatron_dsrl.report.trace_events import FIRST_ENGINE, events_of, write_trace

DIES_WHILE_TRAINING = """
import os, signal, sys
from pathlib import Path
from megatron_dsrl.observability.timeline import Timeline
with Timeline(Path(sys.argv[1]), rank=0, host="node") as timeline:
    timeline.start_step(1)
    with timeline.span("generate"):
        pass
    with timeline.span("train"), timeline.span("onload"):
        os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_run_keeps_what_it_had_and_a_continued_one_adds_to_it(tmp_path) -> None:
    killed = subprocess.run([sys.executable, "-c", DIES_WHILE_TRAINING, str(tmp_path)], timeout=60)
    assert killed.returncode == -signal.SIGKILL
    with trace_file(tmp_path, 0).open("a") as file:
        file.write('{"event": "be')  # in the middle of a line
    with Timeline(tmp_path, rank=0, host="node") as timeline:
        timeline.start_step(1)
        with timeline.span("generate"):
            pass
        with timeline.span("train"):
            pass

    (timeline,) = read_timelines(tmp_path)
    assert [step.step for step in timeline.steps] == [1, 1]
    assert [(span.path, span.finished) for span in timeline.spans] == [
        (("generate",), True),
        (("train",), False),
        (("train", "onload"), False),
        (("generate",), True),
        (("train",), True),
    ]
    assert all(span.when.end >= span.when.start for span in timeline.spans)


def test_times_are_those_of_the_clock_on_the_wall(tmp_path) -> None:
    before = time.time()
    with Timeline(tmp_path, rank=3, host="node") as timeline, timeline.span("train"):
        timeline.engine_call(EngineCall(0, (7,), 10, 1, "done", time.monotonic() - 1, time.monotonic()))
    after = time.time()

    (timeline,) = read_timelines(tmp_path)
    assert (timeline.rank, timeline.host) == (3, "node")
    (span,) = timeline.spans
    assert before - 1e-3 <= span.when.start <= span.when.end <= after + 1e-3
    assert timeline.calls[0].when.seconds == pytest.approx(1, abs=0.01)


def lines(rank: int, *events: tuple) -> list[dict]:
    """What a rank writes: (second, "step", number), (second, "begin" or "end", name) or (second, "call", fields)."""
    keys = {"step": "step", "begin": "name", "end": "name"}
    of_call = {"engine": 0, "seconds": 2, "prompts": [7], "tokens": 10, "attempt": 1, "outcome": "done"}
    records = [{"event": "start", "rank": rank, "host": "node", "time": 0}]
    for second, event, value in events:
        fields = of_call | value if event == "call" else {keys[event]: value, "thread": "MainThread"}
        records.append({"event": event, "time": second, **fields})
    return records


def test_engines_are_busy_while_any_call_is_under_way() -> None:
    timeline = timeline_of(
        lines(
            0,
            (0, "call", {"engine": 1}),  # of the evaluation before the first step
            (10, "step", 1),
            (10, "begin", "generate"),
            (10, "call", {"engine": 0}),
            (11, "call", {"engine": 0}),
            (10, "call", {"engine": 1, "seconds": 1, "tokens": 0, "outcome": "connection refused"}),
            (14, "end", "generate"),
            (20, "step", 2),
        )
    )

    first, second = engines_of(timeline)
    assert (first.calls, first.failed_calls, first.tokens) == (2, 0, 20)
    assert (first.busy_while_sampling, first.busy, first.mean_calls) == (0.75, 0.3, pytest.approx(4 / 3))
    assert (second.calls, second.failed_calls, second.busy_while_sampling) == (1, 1, 0.25)


def test_overlaps_count_once() -> None:
    assert overlap([Interval(0, 3), Interval(2, 5), Interval(8, 9)], [Interval(1, 4), Interval(4.5, 8.5)]) == 4.0


def test_moments_are_found_in_windows_that_touch_or_have_gaps() -> None:
    windows = Windows([Interval(5, 6), Interval(1, 2), Interval(2, 3)])
    assert [moment for moment in (0.5, 1, 2.5, 3, 3.5, 4.9, 5, 6, 6.1) if windows.hold(moment)] == [1, 2.5, 3, 5, 6]
    assert not Windows([]).hold(0)


def engine_events(*calls: tuple) -> list[dict]:
    """Events of engine 0, whose process has the calls (second, fields)."""
    timeline = timeline_of(lines(0, *((second, "call", fields) for second, fields in calls)))
    return [event for event in events_of(timeline, origin=0.0) if event["pid"] == FIRST_ENGINE]


def test_requests_of_an_engine_are_a_counter_over_time() -> None:
    events = engine_events((0, {"seconds": 5}), (1, {"seconds": 1}), (2, {"seconds": 7}), (3, {"seconds": 1}))
    counter = [(event["ts"] / 1e6, event["args"]["requests"]) for event in events if event["ph"] == "C"]
    assert counter == [(0, 1), (1, 2), (3, 3), (4, 2), (5, 1), (9, 0)]  # at 2 s one ends and one begins


def test_only_the_longest_requests_have_tracks_and_none_overlap_in_one() -> None:
    requests = [(0.1 * number, {"seconds": 1 + number % 50, "prompts": [number]}) for number in range(400)]
    slices = [event for event in engine_events(*requests) if event["ph"] == "X"]
    assert len(slices) == 10 and {event["dur"] for event in slices} == {49_000_000, 50_000_000}
    for track in {event["tid"] for event in slices}:
        in_order = sorted((event["ts"], event["ts"] + event["dur"]) for event in slices if event["tid"] == track)
        assert all(end <= start for (_, end), (start, _) in pairwise(in_order))
    assert slices[0]["args"] | {"prompts": ""} == {"prompts": "", "tokens": 10, "attempt": 1, "outcome": "done"}


def test_failed_requests_are_marked_where_they_ended() -> None:
    events = engine_events((0, {}), (1, {"prompts": [5], "outcome": "connection refused"}), (1, {"outcome": "aborted"}))
    (mark,) = [event for event in events if event["ph"] == "i"]
    assert (mark["name"], mark["ts"], mark["args"]["outcome"]) == ("prompt 5", 3_000_000, "connection refused")


def test_the_trace_is_json_with_its_first_event_at_0(tmp_path) -> None:
    timelines = [timeline_of(lines(rank, (10 + rank, "step", 1), (12, "step", 2), (13, "step", 3))) for rank in (0, 1)]
    write_trace(timelines, tmp_path / "trace.json")
    trace = json.loads((tmp_path / "trace.json").read_text())
    steps = [(one["pid"], one["name"], one["ts"], one["dur"]) for one in trace["traceEvents"] if one["ph"] == "X"]
    assert steps[:2] == [(0, "step 1", 0, 2_000_000), (0, "step 2", 2_000_000, 1_000_000)]
    assert (1, "step 1", 1_000_000, 1_000_000) in steps
    assert trace["otherData"]["started"] == "1970-01-01T00:00:10+00:00"


def test_the_summary_names_ranks_that_did_not_finish(capsys) -> None:
    timeline = timeline_of(
        lines(
            1,
            (0, "begin", "build_models"),
            (9, "end", "build_models"),
            (9, "step", 4),
            (9, "begin", "train"),
            (10, "begin", "onload"),
        )  # fmt: skip
    )
    print_summary([timeline], Console())
    printed = capsys.readouterr().out
    assert "rank 1 before its first step: build_models 9.00 s" in printed
    assert "rank 1 did not finish train, train > onload" in printed


def test_a_timeline_that_cannot_be_written_does_not_end_the_run(tmp_path, caplog) -> None:
    (tmp_path / "trace").write_text("in the way")
    with Timeline(tmp_path, rank=0, host="node") as timeline, timeline.span("train"):
        pass
    assert "no longer recorded" in caplog.text
    with pytest.raises(UserError, match="observability.trace"):
        read_timelines(tmp_path)


def test_a_run_that_ended_before_its_first_event_has_no_trace(tmp_path) -> None:
    with Timeline(tmp_path, rank=0, host="node"):
        pass
    with pytest.raises(UserError, match="one without an event yet"):
        read_timelines(tmp_path)


class ManualClock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_parts_add_up_even_if_they_raise_and_the_step_is_the_whole() -> None:
    clock = ManualClock()
    timer = SecondsPerPart(clock)
    with timer.part("generate"):
        clock.now += 3
    with pytest.raises(RuntimeError), timer.part("train"):
        clock.now += 2
        raise RuntimeError
    clock.now += 0.5
    with timer.part("generate"):
        clock.now += 1

    assert timer.metrics() == {"seconds/generate": 4, "seconds/train": 2, "seconds/step": 6.5}


def test_parts_do_not_nest() -> None:
    timer = SecondsPerPart()
    with pytest.raises(AssertionError, match="train inside part generate"), timer.part("generate"):
        with timer.part("train"):
            pass
