"""Timelines as ranks leave them behind; those of real runs are in tests/test_train.py."""

import signal
import subprocess
import sys
import time

import pytest

from megatron_dsrl.errors import UserError
from megatron_dsrl.observability.timeline import Timeline, trace_file
from megatron_dsrl.observability.timeline_records import Interval, read_timelines, timeline_of
from megatron_dsrl.observability.timeline_summary import engines_of, overlap, parts_of
from megatron_dsrl.observability.trace_events import rows
from megatron_dsrl.rollout.engine_call import EngineCall

DIES_WHILE_TRAINING = """
import os, signal, sys
from pathlib import Path
from megatron_dsrl.observability.timeline import Timeline
with Timeline(Path(sys.argv[1]), rank=0, host="node") as timeline:
    timeline.begin_step(1)
    with timeline.span("generate"):
        pass
    with timeline.span("train"), timeline.span("onload"):
        os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_run_keeps_what_it_had_and_a_continued_one_adds_to_it(tmp_path):
    killed = subprocess.run([sys.executable, "-c", DIES_WHILE_TRAINING, str(tmp_path)], timeout=60)
    assert killed.returncode == -signal.SIGKILL
    with trace_file(tmp_path, 0).open("a") as file:
        file.write('{"event": "be')  # in the middle of a line
    with Timeline(tmp_path, rank=0, host="node") as timeline:
        timeline.begin_step(1)
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


def test_times_are_those_of_the_clock_on_the_wall(tmp_path):
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
    of_call = {"seconds": 2, "prompts": [7], "tokens": 10, "attempt": 1, "outcome": "done"}
    records = [{"event": "start", "rank": rank, "host": "node", "time": 0}]
    for second, event, value in events:
        fields = of_call | value if event == "call" else {keys[event]: value, "thread": "MainThread"}
        records.append({"event": event, "time": second, **fields})
    return records


def test_parts_are_means_over_steps_and_ranks_with_the_worst_rank():
    timelines = [
        timeline_of(
            lines(
                rank,
                (0, "begin", "build_models"),
                (9, "end", "build_models"),
                (10, "step", 1),
                (10, "begin", "train"),
                (10, "begin", "onload"),
                (11, "end", "onload"),
                (12, "end", "train"),
                (14, "step", 2),
                (14, "begin", "train"),
                (16 + 4 * rank, "end", "train"),
                (22, "step", 3),
            )
        )
        for rank in (0, 1)
    ]

    figures = {part.path: part for part in parts_of(timelines)}
    assert list(figures) == [(), ("train",), ("train", "onload")]  # nothing of what came before the steps
    assert figures[()].mean_seconds == 4  # 4, 8 and 0 seconds
    train = figures[("train",)]
    assert train.mean_seconds == pytest.approx((4 / 3 + 8 / 3) / 2)
    assert (train.worst_rank, train.worst_rank_seconds) == (1, pytest.approx(8 / 3))
    assert (train.longest_seconds, train.longest_step, train.longest_rank) == (6, 2, 1)


def test_engines_are_busy_while_any_call_is_under_way():
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


def test_calls_that_overlap_are_drawn_in_rows_of_their_own():
    assert rows([Interval(0, 5), Interval(1, 2), Interval(2, 9), Interval(3, 4), Interval(5, 6)]) == [0, 1, 1, 2, 0]
    assert overlap([Interval(0, 3), Interval(2, 5), Interval(8, 9)], [Interval(1, 4), Interval(4.5, 8.5)]) == 4.0


def test_a_timeline_that_cannot_be_written_does_not_end_the_run(tmp_path, caplog):
    (tmp_path / "trace").write_text("in the way")
    with Timeline(tmp_path, rank=0, host="node") as timeline, timeline.span("train"):
        pass
    assert "not recorded any further" in caplog.text
    with pytest.raises(UserError, match="observability.trace"):
        read_timelines(tmp_path)
