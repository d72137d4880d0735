"""The samples of a benchmark on disk: one JSON line per finished problem, written at once.

The first line says what was evaluated and how. An evaluation that continues must be the same one.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_dsrl.errors import UserError
from megatron_dsrl.evaluation.problem_result import ProblemResult
from megatron_dsrl.observability.records import read_records, record_line, repair_records


class SampleFile:
    """Opened for appending. Use it as a context manager."""

    def __init__(self, path: Path, settings: Mapping[str, Any]):
        """Read what is there already, or begin the file.

        Args:
            path: the file; folders are made.
            settings: everything that decides about the samples.

        Raises:
            UserError: the file was made with other settings, or is damaged.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        settings = json.loads(json.dumps(settings))
        records = repair_records(path)
        if records:
            _check_settings(records[0], settings, path)
        self.done = _results(records[1:], path)
        """Finished problems by row number."""
        self._stream = path.open("a", encoding="utf-8")
        if not records:
            self._write(settings)

    def add(self, result: ProblemResult) -> None:
        """A finished problem. It is on disk when this returns."""
        self.done[result.index] = result
        self._write(result.as_record())

    def close(self) -> None:
        """No more problems."""
        self._stream.close()

    def __enter__(self) -> "SampleFile":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _write(self, record: Mapping[str, Any]) -> None:
        self._stream.write(record_line(dict(record)))
        self._stream.flush()
        os.fsync(self._stream.fileno())


def read_sample_file(path: Path) -> list[ProblemResult]:
    """The finished problems of a sample file, `<evaluation>/samples/<benchmark>.jsonl`.

    Raises:
        UserError: there is none, or it is damaged.
    """
    if not path.is_file():
        raise UserError(f"{path} is neither a run folder nor a sample file of `dsrl eval`")
    problems = list(_results(read_records(path)[1:], path).values())
    if not problems:
        raise UserError(f"{path} holds no finished problem yet")
    return problems


def _results(records: list[dict[str, Any]], path: Path) -> dict[int, ProblemResult]:
    try:
        return {record["index"]: ProblemResult.of_record(record) for record in records}
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: a line is no finished problem ({error!r}); remove the file to begin anew") from error


def _check_settings(before: Mapping[str, Any], now: Mapping[str, Any], path: Path) -> None:
    different = [key for key in sorted({*before, *now}) if before.get(key) != now.get(key)]
    if different:
        changes = "; ".join(f"{key}: {before.get(key)!r:.80} then, {now.get(key)!r:.80} now" for key in different)
        raise UserError(
            f"{path} was made with other settings ({changes}). Name another folder with --output, or remove the file."
        )
