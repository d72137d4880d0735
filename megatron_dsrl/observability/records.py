"""JSON-lines files that survive a crash: one flat JSON object per line, appended and flushed line by line.

A process that dies while it writes can leave a half-written last line. Opening for append repairs that line; reading
(a report of a run that is still going) skips it. A broken line anywhere else is damage that must not be hidden,
so it is an error that names the file and the line.
"""

import json
import logging
import math
import os
from io import FileIO
from pathlib import Path
from typing import Any

from megatron_dsrl.common.disk import replace_text, writing
from megatron_dsrl.common.errors import UserError

CHECKPOINTS_FOLDER = "checkpoints"
EXPORTS_FOLDER = "hf"
"""Folders in a run's folder: a `step_000001` for every checkpoint and exported policy."""

CONFIG_FILE = "config.yaml"
PROVENANCE_FILE = "provenance.jsonl"
"""One record for every start of a command in the folder."""

METRICS_FILE = "metrics.jsonl"
EVALUATION_FILE = "evaluation.jsonl"
RESPONSES_FILE = "evaluation_responses.jsonl"
"""Some responses of every evaluation: `step`, `set`, and `responses` with prompt, response, answer, reward..."""

Record = dict[str, Any]

logger = logging.getLogger(__name__)


def plain_record(record: Record) -> Record:
    """The record with plain JSON values: zero-dimensional tensors become numbers, NaN and infinities become null.

    Every value replaced by null is logged as a warning, because JSON has no NaN and a silent one would hide a
    diverged run.
    """
    return {key: _plain_value(key, value, record.get("step")) for key, value in record.items()}


def _plain_value(key: str, value: Any, step: Any) -> str | int | float | bool | None:
    if hasattr(value, "item"):
        value = value.item()
    assert value is None or isinstance(value, (str, bool, int, float)), f"record value {key} is a {type(value)}"
    if isinstance(value, float) and not math.isfinite(value):
        logger.warning("step %s: %s is %s and is recorded as null", step, key, value)
        return None
    return value


def shown_metrics(record: Record) -> dict[str, int | float]:
    """The numbers of a step or evaluation record, by the names under which TensorBoard and trackers show them.

    Those of an evaluation begin with `evaluation/<set>/`.
    """
    prefix = f"evaluation/{record['set']}/" if "set" in record else ""
    return {
        prefix + key: value
        for key, value in record.items()
        if key not in ("step", "time") and isinstance(value, (int, float))
    }


def read_records(path: Path) -> list[Record]:
    """All complete records of a file, oldest first; a missing file has none. A half-written last line is left out.

    Raises UserError for a broken line that is not the last one, and for NaN, infinities and numbers beyond a float.
    """
    if not path.exists():
        return []
    return _parse_records(path)[0]


def repair_records(path: Path) -> list[Record]:
    """Like `read_records`, but also repairs the end of the file so that the next line can be appended."""
    if not path.exists():
        return []
    records, complete_bytes = _parse_records(path)
    content = path.read_bytes()
    tail = content[complete_bytes:]
    if tail:
        logger.warning("%s: removed a half-written last line of %d bytes", path, len(tail))
        os.truncate(path, complete_bytes)
    elif content and not content.endswith(b"\n"):
        with path.open("ab") as file:
            file.write(b"\n")
    return records


def replace_records(path: Path, records: list[Record]) -> None:
    """Replace the whole file atomically: a crash leaves either the old content or the new one."""
    replace_text(path, "".join(record_line(record) for record in records))


def record_line(record: Record) -> str:
    """One line of the file, line end included."""
    return json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"


def append_record(stream: FileIO, record: Record, what_is_safe: str) -> None:
    """Append one record to an open file. Raises UserError, with the file's name, if the disk refuses it.

    The stream is unbuffered, because a failed write would leave data in the buffer for `close`.
    """
    line = record_line(record).encode()
    with writing(Path(stream.name), what_is_safe):
        while line:
            line = line[stream.write(line) :]


def _parse_records(path: Path) -> tuple[list[Record], int]:
    """Records, and the number of bytes at the start of the file that hold complete ones."""
    records: list[Record] = []
    complete_bytes = 0
    lines = path.read_bytes().splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        try:
            record = _parse_line(line)
        except _NumberError as error:
            raise UserError(f"{path}, line {number}: {error} cannot be read. Replace it with null.") from error
        if record is None and line.strip():
            if number < len(lines):
                raise UserError(f"{path}, line {number}: not a JSON object. Remove the line or restore the file.")
            break
        if record is not None:
            records.append(record)
        complete_bytes += len(line)
    return records, complete_bytes


class _NumberError(Exception):
    """A number that JSON does not have or that no float can hold."""


def _refuse(text: str) -> float:
    raise _NumberError(f"the number {text[:20]}{'...' * (len(text) > 20)}")


def _float(text: str) -> float:
    return value if math.isfinite(value := float(text)) else _refuse(text)


def _int(text: str) -> int | float:
    return int(text) if math.isfinite(float(text)) else _refuse(text)


def _parse_line(line: bytes) -> Record | None:
    """The object of a line; None if it is not one. Raises _NumberError if it is an object, but with such a number."""
    try:
        value = json.loads(line, parse_float=_float, parse_int=_int, parse_constant=_refuse)
    except ValueError:  # also what undecodable bytes raise
        return None
    return value if isinstance(value, dict) else None


def read_starts(folder: Path) -> list[Record]:
    """All recorded starts of a folder, oldest first. Raises UserError if the file is damaged."""
    return read_records(folder / PROVENANCE_FILE)
