"""Profiles of chosen steps: written by torch.profiler, and put on the clock of the run's timeline."""

import gzip
import json
import re
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from megatron_dsrl.common.errors import UserError
from megatron_dsrl.observability.profiler import StepProfiler
from megatron_dsrl.observability.timeline import ProfileFile, Timeline, profile_file, profile_files
from megatron_dsrl.platform.cuda import CudaPlatform
from megatron_dsrl.report.timeline import read_timelines
from megatron_dsrl.report.trace_events import profile_events, write_trace


def two_profiled_ranks(folder: Path) -> list[str]:
    """Timelines and profiles of ranks 0 and 1, which multiply matrices in steps 1 to 3; returns what was reported."""
    reported: list[str] = []
    for rank in (0, 1):
        profiler = StepProfiler([2, 3, 9], folder, rank, nsight=False, report=reported.append)
        with Timeline(folder, rank, "node") as timeline:
            for step in (1, 2, 3):
                timeline.start_step(step)
                with profiler.step(step), timeline.span("train"):
                    torch.ones(50, 50) @ torch.ones(50, 50)
    return reported


def test_operations_of_the_chosen_steps_lie_within_their_spans_in_the_trace(tmp_path) -> None:
    assert two_profiled_ranks(tmp_path) == []
    profiles = profile_files(tmp_path)
    assert [(profile.rank, profile.step) for profile in profiles] == [(0, 2), (0, 3), (1, 2), (1, 3)]
    write_trace(read_timelines(tmp_path), tmp_path / "trace.json", profiles)
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    names = {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}
    for rank in (0, 1):
        spans = [event for event in events if event["ph"] == "X" and event["pid"] == rank and event["name"] == "train"]
        (process,) = [pid for pid, name in names.items() if name.startswith(f"rank {rank}, profile: ")]
        products = [event for event in events if event["pid"] == process and event["name"] == "aten::mm"]
        assert len(spans) == 3 and len(products) == 2
        for span, product in zip(spans[1:], products, strict=True):
            # Both clocks are the system's, rounded to microseconds.
            assert span["ts"] - 2 <= product["ts"] < product["ts"] + product["dur"] <= span["ts"] + span["dur"] + 2


def write_profile(folder: Path, rank: int, step: int, events: list[dict]) -> ProfileFile:
    """A profile whose times count from second 100."""
    file = profile_file(folder, rank, step)
    file.parent.mkdir(exist_ok=True)
    with gzip.open(file, "wt") as stream:
        json.dump({"baseTimeNanoseconds": 100 * 10**9, "traceEvents": events}, stream)
    return ProfileFile(rank, step, file)


def test_gpus_are_processes_of_their_rank_and_flows_stay_within_their_profile(tmp_path) -> None:
    """As on a GPU: its number is that of a rank, and every profile counts its flows from 1."""
    call = {"ph": "s", "id": 1, "pid": 4711, "tid": 4711, "ts": 5.25, "cat": "ac2g", "name": "ac2g"}
    kernel = {"ph": "f", "id": 1, "pid": 0, "tid": 7, "ts": 9.5, "cat": "ac2g", "name": "ac2g", "bp": "e"}
    gpu = {"ph": "M", "name": "process_labels", "pid": 0, "tid": 0, "args": {"labels": "GPU 0"}}
    found = [
        list(profile_events(write_profile(tmp_path, rank, step, [call, kernel, gpu]), origin=99.0))
        for rank, step in ((0, 3), (0, 4), (1, 3))
    ]
    assert [event["ts"] for event in found[0][:2]] == [1_000_005.25, 1_000_009.5]
    assert [events[0]["id"] == events[1]["id"] for events in found] == [True] * 3
    assert len({events[0]["id"] for events in found}) == 3
    processes = [{event["pid"] for event in events} for events in found]
    assert processes[0] == processes[1] and not processes[0] & processes[2] and len(processes[0]) == 2
    assert not processes[0] & {0, 1, 4711}


def test_a_damaged_profile_is_named(tmp_path) -> None:
    profile = write_profile(tmp_path, 0, 3, [])
    profile.path.write_bytes(profile.path.read_bytes()[:-9])
    with pytest.raises(UserError, match=re.escape(f"{profile.path} is damaged")):
        list(profile_events(profile, origin=0.0))


def test_a_profile_that_cannot_be_written_is_reported_and_does_not_end_the_run(tmp_path) -> None:
    (tmp_path / "trace").write_text("in the way")
    reported: list[str] = []
    with StepProfiler([1], tmp_path, 0, nsight=False, report=reported.append).step(1):
        torch.ones(3)
    assert len(reported) == 1 and "no profile of this step" in reported[0]


def test_nsight_captures_the_chosen_steps(tmp_path, monkeypatch) -> None:
    with pytest.raises(UserError, match="profile_with=nsight needs a CUDA device"):
        StepProfiler([2], tmp_path, 0, nsight=True, report=print)
    calls: list[str] = []
    monkeypatch.setattr("megatron_dsrl.observability.profiler.current_platform", CudaPlatform)
    monkeypatch.setattr(torch.cuda.profiler, "start", lambda: calls.append("start"))
    monkeypatch.setattr(torch.cuda.profiler, "stop", lambda: calls.append("stop"))
    profiler = StepProfiler([2], tmp_path, 0, nsight=True, report=print)
    for step in (1, 2, 3):
        with profiler.step(step):
            calls.append(f"step {step}")
    assert calls == ["step 1", "start", "step 2", "stop", "step 3"]


def test_every_span_is_a_range_of_nvtx_on_cuda(tmp_path, monkeypatch) -> None:
    ranges: list[str] = []

    def open_range(name: str) -> AbstractContextManager[None]:
        ranges.append(name)
        return nullcontext()

    monkeypatch.setattr(torch.cuda.nvtx, "range", open_range)
    with Timeline(tmp_path, 0, "node", CudaPlatform().annotation) as timeline:
        for name, inner in pairwise(["train", "onload", "push_weights"]):
            with timeline.span(name), timeline.span(inner):
                pass
    assert ranges == ["train", "onload", "onload", "push_weights"]
