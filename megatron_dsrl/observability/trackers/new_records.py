"""Records of a run folder in the order in which trackers take them, as they are appended."""

import json
from dataclasses import dataclass, field
from pathlib import Path

from megatron_dsrl.common.errors import UserError
from megatron_dsrl.observability.records import EVALUATION_FILE, METRICS_FILE, RESPONSES_FILE, Record


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
        self._steps = _AppendedLines(run_folder / METRICS_FILE)
        self._evaluations = _AppendedLines(run_folder / EVALUATION_FILE)
        self._responses = _AppendedLines(run_folder / RESPONSES_FILE)
        self._last_step = 0
        self._waiting: list[Record] = []
        """Evaluations after a step whose own record has not been read yet."""
        self._responses_of: dict[tuple[int, str], list[Record]] = {}

    def read(self) -> list[NewRecord]:
        """New records by step; a step's own comes before its evaluations, and no later call goes back.

        Raises:
            UserError: a line is damaged.
        """
        # In this order: a step is written before its evaluations, but responses before the evaluation they belong to.
        steps = self._steps.read()
        self._last_step = max([self._last_step, *(record["step"] for record in steps)])
        self._waiting += self._evaluations.read()
        for line in self._responses.read():
            self._responses_of[line["step"], line["set"]] = line["responses"]
        ready = [record for record in self._waiting if record["step"] <= self._last_step]
        self._waiting = [record for record in self._waiting if record["step"] > self._last_step]
        found = [NewRecord(record["step"], record) for record in steps]
        found += [self._evaluation(record) for record in ready]
        return sorted(found, key=lambda each: (each.step, each.evaluation_set is not None))

    def _evaluation(self, record: Record) -> NewRecord:
        step, name = record["step"], record["set"]
        return NewRecord(step, record, name, self._responses_of.pop((step, name), []))


class _AppendedLines:
    """The complete lines of a JSON-lines file that were appended since the last call."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0

    def read(self) -> list[Record]:
        """The new records; none while the file does not exist.

        Raises:
            UserError: a complete line is not JSON.
        """
        try:
            with open(self._path, "rb") as file:
                file.seek(self._offset)
                content = file.read()
        except FileNotFoundError:
            return []
        complete = content[: content.rfind(b"\n") + 1]
        try:
            records = [json.loads(line) for line in complete.splitlines() if line.strip()]
        except ValueError as error:
            raise UserError(f"{self._path}: a line is not JSON. Remove the line or restore the file.") from error
        self._offset += len(complete)
        return records
