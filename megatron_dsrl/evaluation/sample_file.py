"""The samples of a benchmark on disk: one JSON line per finished sample, written immediately.

The first line has the evaluation's settings, which must be the same when it continues. Each other line has a problem
with one sample, in the order in which they finished; a line may also have several consecutive samples, as in files of
earlier versions.

Written lines survive the death of all processes. fsync is called at most once a second, since it takes tens of
milliseconds on shared file systems: only a machine failure can lose that second.
"""

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_dsrl.common.errors import UserError
from megatron_dsrl.evaluation.problem_result import ProblemResult, joined
from megatron_dsrl.observability.records import read_records, record_line, repair_records

SYNC_SECONDS = 1.0


class SampleFile:
    """A sample file open for appending; a context manager."""

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        """Read the existing file, or create it.

        Args:
            path: the file; folders are created.
            settings: everything that determines the samples.

        Raises:
            UserError: the file was made with other settings, or is damaged.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        plain: dict[str, Any] = json.loads(json.dumps(settings))
        before, *records = repair_records(path) or [plain]
        if records:
            _check_settings(before, plain, path)
        self._parts = _parts(records, path)
        self._stream = path.open("a" if records else "w", encoding="utf-8")
        self._synced = 0.0
        if not records:  # a file with settings only is written again
            self._write(plain)

    @property
    def problems(self) -> dict[int, ProblemResult]:
        """Problems, by row number, with their samples so far."""
        return {index: joined(parts) for index, parts in self._parts.items()}

    def numbers(self, index: int) -> set[int]:
        """Numbers of a problem's samples so far."""
        return {number for part in self._parts.get(index, ()) for number in part.numbers}

    def add(self, result: ProblemResult) -> None:
        """Append finished samples of a problem. They are in the file when this returns."""
        assert self.numbers(result.index).isdisjoint(result.numbers), f"problem {result.index}: sampled twice"
        self._parts.setdefault(result.index, []).append(result)
        self._write(result.as_record())

    def close(self) -> None:
        """Close the file. All samples are on disk when this returns."""
        self._sync()
        self._stream.close()

    def __enter__(self) -> "SampleFile":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _write(self, record: Mapping[str, Any]) -> None:
        self._stream.write(record_line(dict(record)))
        self._stream.flush()
        if time.monotonic() - self._synced > SYNC_SECONDS:
            self._sync()

    def _sync(self) -> None:
        os.fsync(self._stream.fileno())
        self._synced = time.monotonic()


def read_sample_file(path: Path) -> list[ProblemResult]:
    """The problems of a sample file, `<evaluation>/samples/<benchmark>.jsonl`, that have all their samples.

    Raises:
        UserError: the file does not exist or is damaged.
    """
    if not path.is_file():
        raise UserError(f"{path} is neither a run folder nor a sample file of `dsrl eval`")
    settings, *records = read_records(path) or [{}]
    samples_per_prompt = settings.get("benchmark", {}).get("samples_per_prompt", 1)
    problems = [joined(parts) for parts in _parts(records, path).values()]
    problems = [problem for problem in problems if len(problem.samples) >= samples_per_prompt]
    if not problems:
        raise UserError(f"{path} has no finished problem yet")
    return problems


def read_settings(path: Path) -> dict[str, Any]:
    """The evaluation's settings, from the first line of a sample file."""
    return (read_records(path) or [{}])[0]


def _parts(records: list[dict[str, Any]], path: Path) -> dict[int, list[ProblemResult]]:
    """The saved parts of every problem, by row number."""
    parts: dict[int, list[ProblemResult]] = {}
    try:
        for part in map(ProblemResult.of_record, records):
            parts.setdefault(part.index, []).append(part)
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: a line is not a valid sample ({error!r}); delete the file to start over") from error
    return parts


def _check_settings(before: Mapping[str, Any], now: Mapping[str, Any], path: Path) -> None:
    different = [key for key in sorted({*before, *now}) if before.get(key) != now.get(key)]
    if different:
        changes = "; ".join(f"{key}: {before.get(key)!r:.80} then, {now.get(key)!r:.80} now" for key in different)
        raise UserError(
            f"{path} was made with other settings ({changes}). Choose another folder with --output, or delete the file."
        )
