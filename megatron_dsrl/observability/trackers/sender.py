"""Sends a run folder to one tracker: everything that the tracker does not have yet."""

import json
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from megatron_dsrl.common.errors import UserError
from megatron_dsrl.observability import records
from megatron_dsrl.observability.records import Record
from megatron_dsrl.observability.trackers.base import RESPONSE_COLUMNS, Status, TrackedRun, TrackerOptions, TrackerRun
from megatron_dsrl.observability.trackers.cursor import Cursor


@dataclass(frozen=True)
class NewRecord:
    """A step record, or the record of an evaluation with some of its responses."""

    step: int
    record: Record
    evaluation_set: str | None = None
    """None: a step record."""
    responses: list[Record] = field(default_factory=list)


class NewRecords:
    """Reads what has been appended since the last time. The files may not exist yet."""

    def __init__(self, run_folder: Path) -> None:
        self._steps = _AppendedLines(run_folder / records.METRICS_FILE)
        self._evaluations = _AppendedLines(run_folder / records.EVALUATION_FILE)
        self._responses = _AppendedLines(run_folder / records.RESPONSES_FILE)
        self._last_step = 0
        self._waiting: list[Record] = []
        """Evaluations after a step whose own record has not been read yet."""
        self._responses_of: dict[tuple[int, str], list[Record]] = {}

    def read(self) -> list[NewRecord]:
        """New records by step; a step's own comes before its evaluations, and steps never decrease over calls. Raises
        UserError if a line is damaged."""
        # In this order: a step is written before its evaluations, but responses before the evaluation they belong to.
        steps = self._steps.read()
        self._last_step = max([self._last_step, *(record["step"] for record in steps)])
        self._waiting += self._evaluations.read()
        for line in self._responses.read():
            self._responses_of[line["step"], line["set"]] = line["responses"]
        ready = [record for record in self._waiting if record["step"] <= self._last_step]
        self._waiting = [record for record in self._waiting if record["step"] > self._last_step]
        found = [NewRecord(record["step"], record) for record in steps]
        for record in ready:
            step, name = record["step"], record["set"]
            found.append(NewRecord(step, record, name, self._responses_of.pop((step, name), [])))
        return sorted(found, key=lambda each: (each.step, each.evaluation_set is not None))


class _AppendedLines:
    """The complete lines of a JSON-lines file that were appended since the last call."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0

    def read(self) -> list[Record]:
        """The new records; none while the file does not exist. Raises UserError if a complete line is not JSON."""
        try:
            with open(self._path, "rb") as file:
                file.seek(self._offset)
                content = file.read()
        except FileNotFoundError:
            return []
        complete = content[: content.rfind(b"\n") + 1]
        try:
            new = [json.loads(line) for line in complete.splitlines() if line.strip()]
        except ValueError as error:
            raise UserError(f"{self._path}: a line is not JSON. Remove the line or restore the file.") from error
        self._offset += len(complete)
        return new


class Sender:
    """Until it is closed, no other process can send to the same destination."""

    def __init__(self, run_folder: Path, options: TrackerOptions, training_process: int | None = None) -> None:
        """
        Raises:
            InUse: another process sends to the same destination.
            UserError: the run folder's record of the destination is damaged.
        """
        self._folder = run_folder
        self._options = options
        self._training_process = training_process
        self._cursor = Cursor(run_folder, options)
        self._records = NewRecords(run_folder)
        self._pending: deque[NewRecord] = deque()
        self._run: TrackerRun | None = None
        self.steps = 0
        """Step records sent so far."""
        self.evaluations = 0
        """Evaluations sent so far."""

    @property
    def url(self) -> str | None:
        """Web address of the run; None before it is open."""
        return self._run.url if self._run else None

    @property
    def run_id(self) -> str:
        """See `TrackedRun.id`."""
        return self._cursor.sent.run_id

    def open(self) -> None:
        """Begin or continue the run at the service, unless it is open. Raises what the tracker raises."""
        if self._run is None:
            config = run_config(self._folder)
            name = str(config.get("name", self._folder.resolve().name))
            tracked = TrackedRun(self.run_id, name, self._folder, config, self._training_process)
            self._run = self._options.open(tracked)

    def has_news(self) -> bool:
        """Whether there is a record that the tracker does not have."""
        while True:
            while self._pending and self._was_sent(self._pending[0]):
                self._pending.popleft()
            if self._pending:
                return True
            self._pending.extend(self._records.read())
            if not self._pending:
                return False

    def send_new(self) -> None:
        """Send the records that the tracker does not have. Raises what the tracker raises; a later call continues."""
        while self.has_news():
            self.open()
            self._send(self._pending[0])
            self._cursor.save()
            self._pending.popleft()

    def finish(self, status: Status) -> None:
        """Close the run at the service if it is open."""
        if self._run is not None:
            self._run.finish(status)

    def close(self) -> None:
        """Let other processes send to the same destination."""
        self._cursor.close()

    def _was_sent(self, new: NewRecord) -> bool:
        sent = self._cursor.sent
        if new.evaluation_set is None:
            return new.step <= sent.last_step
        return new.step <= sent.evaluations.get(new.evaluation_set, -1)

    def _send(self, new: NewRecord) -> None:
        assert self._run is not None
        self._run.log(new.step, records.shown_metrics(new.record), new.record.get("time"))
        if new.evaluation_set is None:
            self._cursor.sent.last_step = new.step
            self.steps += 1
            return
        if new.responses:
            rows = [[response.get(column) for column in RESPONSE_COLUMNS] for response in new.responses]
            self._run.log_responses(new.step, new.evaluation_set, rows)
        self._cursor.sent.evaluations[new.evaluation_set] = new.step
        self.evaluations += 1


def run_config(run_folder: Path) -> dict[str, Any]:
    """The configuration that a tracker shows for a run; see `TrackedRun.config`."""
    file = run_folder / records.CONFIG_FILE
    config = yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else {}
    config["phase_schedule"] = phase_schedule(config)
    if starts := records.read_starts(run_folder):
        config["provenance"] = starts[-1]
    return config


def phase_schedule(config: Mapping[str, Any]) -> list[Record]:
    """Name, first and last step of every phase of a resolved configuration."""
    schedule, first = [], 1
    for phase in config.get("phases", ()):
        last = min(phase.get("until_step") or config["steps"], config["steps"])
        if first <= last:
            schedule.append({"name": phase["name"], "first_step": first, "last_step": last})
        first = last + 1
    return schedule
