"""A tracker by dotted path that records its calls in a file, and can fail or hang."""

import json
import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from megatron_dsrl.observability.trackers.base import Status, TrackedRun, TrackerOptions, TrackerRun

PATH = "tests.support.recording_tracker:RecordingTracker"

Trouble = Literal["none", "open_fails", "hangs", "crashes", "second_step_fails_once"]


class RecordingTracker(TrackerOptions):
    file: str
    """One JSON line per call."""
    trouble: Trouble = "none"

    def open(self, run: TrackedRun) -> TrackerRun:
        if self.trouble == "open_fails":
            raise ConnectionError("no route to the tracker")
        if self.trouble == "hangs":
            threading.Event().wait(3600)
        if self.trouble == "crashes":
            os._exit(7)
        recording = Recording(Path(self.file), self.trouble)
        recording.write("open", id=run.id, name=run.name, process=run.training_process, config=dict(run.config))
        return recording


class Recording(TrackerRun):
    url = "http://tracker/run"

    def __init__(self, file: Path, trouble: Trouble) -> None:
        self._file = file
        self._failures_left = int(trouble == "second_step_fails_once")

    def log(self, step: int, metrics: Mapping[str, float], time: float | None) -> None:
        if step == 2 and self._failures_left:
            self._failures_left -= 1
            raise TimeoutError("the tracker is busy")
        self.write("log", step=step, metrics=dict(metrics))

    def log_responses(self, step: int, evaluation_set: str, rows: Sequence[Sequence[Any]]) -> None:
        self.write("responses", step=step, set=evaluation_set, rows=rows)

    def finish(self, status: Status) -> None:
        self.write("finish", status=status)

    def write(self, call: str, **arguments: Any) -> None:
        with open(self._file, "a") as stream:
            stream.write(json.dumps({"call": call, **arguments}) + "\n")


def calls(file: Path, *names: str) -> list[dict[str, Any]]:
    """The calls so far; only those with these names, if any are given."""
    lines = file.read_text().splitlines() if file.exists() else []
    return [call for call in map(json.loads, lines) if not names or call["call"] in names]
