"""Rows of a prompt set, from a local file or the hub."""

import csv
import glob
import gzip
import json
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from megatron_dsrl.common.errors import UserError
from megatron_dsrl.common.hub import asking_hub, can_reach_hub
from megatron_dsrl.config.data import PromptSetConfig

Row = dict[str, Any]

LOCAL_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
LONGEST_FIELD = 2**31 - 1
"""Characters of a CSV field. Python's own limit, 131,072, is shorter than some reasoning traces."""
_HUB_NAME = re.compile(r"(\w[\w.-]*/)?\w[\w.-]*", re.ASCII)
SAVED_FILES = ("dataset_dict.json", "state.json")
"""Files that identify a folder of `datasets`' save_to_disk, with several splits and with one."""


def read_rows(config: PromptSetConfig, section: str) -> list[Row]:
    """The rows of a set, at most `config.limit`; never an empty list. Raises UserError if the source is missing,
    unreadable or empty, or contains something other than rows."""
    rows: Iterator[Row]
    files, folder = local_files(config.source), _path(config.source)
    if files is not None:
        _require_files(files, config.source, section)
        rows = (row for file in files for row in _read_local(file, config.rows_field, section))
    elif folder.is_file():
        raise UserError(f"{section}.source: {config.source} has an unknown suffix; use {', '.join(LOCAL_SUFFIXES)}")
    elif any((folder / name).is_file() for name in SAVED_FILES):
        rows = _read_saved(folder, config.split, section)
    elif folder.is_dir():
        rows = _read_folder(config, folder, section)
    else:
        _require_hub_name(config.source, section)
        rows = _read_hub(config, section)
    taken = list(islice(rows, config.limit))
    if not taken:
        raise UserError(f"{section}.source: {config.source} holds no rows")
    return taken


def count_rows(config: PromptSetConfig, section: str, advice: str | None = None) -> int | None:
    """Number of rows of a set, at most `config.limit`; None for what must be loaded to be counted, such as a hub name.

    JSON lines are not parsed, and Parquet is not read. Raises UserError if a local file is missing, with `advice` on
    what to do, or unreadable or empty.
    """
    files = local_files(config.source)
    if files is None:
        if not _path(config.source).exists():
            _require_hub_name(config.source, section)
        return None
    _require_files(files, config.source, section, advice)
    rows = sum(_count_local(file, config.rows_field, section) for file in files)
    if rows == 0:
        raise UserError(f"{section}.source: {config.source} holds no rows")
    return rows if config.limit is None else min(rows, config.limit)


def local_files(source: str) -> list[Path] | None:
    """The files that a source names, existing or not; None for a data set in a folder or on the hub."""
    path = _path(source)
    if "*" in source:
        found = sorted(Path(file) for file in glob.glob(str(path), recursive=True))
        known = [file for file in found if _kind(file) in LOCAL_SUFFIXES]
        return known if known or _kind(path) in LOCAL_SUFFIXES else None
    return [path] if _kind(path) in LOCAL_SUFFIXES else None


def _require_files(files: list[Path], source: str, section: str, advice: str | None = None) -> None:
    if files and files[0].is_dir():
        raise UserError(f"{section}.source: {source} is a folder; name its files: {source}/*{_kind(files[0])}")
    if not files or not files[0].is_file():
        raise UserError(f"{section}.source: no such file: {source}; {advice or 'create it, or correct the path'}")


def _require_hub_name(source: str, section: str) -> None:
    """Raise UserError if the source, which is neither a file nor a folder, cannot be a hub name either."""
    if not _HUB_NAME.fullmatch(source):
        raise UserError(f"{section}.source: no such file or folder: {source}; create it, or correct the path")


def _path(source: str) -> Path:
    return Path(source.removeprefix("file://")).expanduser()


def _kind(path: Path) -> str:
    """The file's suffix in lower case, ignoring a final `.gz`."""
    return (Path(path.stem).suffix if path.suffix.lower() == ".gz" else path.suffix).lower()


def _open(path: Path) -> TextIO:
    encoding = "utf-8-sig"  # UTF-8 with or without a byte order mark, which Excel writes
    if path.suffix.lower() == ".gz":
        return gzip.open(path, "rt", encoding=encoding, newline="")
    return path.open(encoding=encoding, newline="")


def _read_local(path: Path, rows_field: str | None, section: str) -> Iterator[Row]:
    readers = {
        ".jsonl": _json_lines,
        ".ndjson": _json_lines,
        ".json": lambda file: _json_list(file, rows_field),
        ".csv": _csv,
        ".tsv": lambda file: _csv(file, delimiter="\t"),
        ".parquet": _parquet,
    }
    with _reading(path, section):
        for index, row in enumerate(readers[_kind(path)](path)):
            if not isinstance(row, dict):
                raise ValueError(f"row {index} is a {type(row).__name__}, expected an object of fields")
            yield row


def _count_local(path: Path, rows_field: str | None, section: str) -> int:
    if _kind(path) not in (".jsonl", ".ndjson", ".parquet"):
        return sum(1 for _ in _read_local(path, rows_field, section))
    with _reading(path, section):
        if _kind(path) == ".parquet":
            import pyarrow.parquet

            return pyarrow.parquet.read_metadata(path).num_rows
        with _open(path) as file:
            return sum(1 for line in file if line.strip())


@contextmanager
def _reading(path: Path, section: str) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as error:
        raise UserError(
            f"{section}.source: {path} is not text in UTF-8 ({error}); convert it, for example with iconv"
        ) from error
    # JSON and Arrow errors are ValueErrors.
    except (OSError, EOFError, ValueError, RecursionError, csv.Error, zlib.error) as error:
        raise UserError(f"{section}.source: cannot read {path}: {error}") from error


def _json_lines(path: Path) -> Iterator[Any]:
    with _open(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"line {number} is not JSON: {error}") from error


def _json_list(path: Path, rows_field: str | None) -> Iterator[Any]:
    try:
        with _open(path) as file:
            rows = json.load(file)
    except json.JSONDecodeError as error:
        if rows_field is None and error.msg == "Extra data":  # JSON lines in a .json file
            yield from _json_lines(path)
            return
        raise
    if rows_field is not None:
        if not isinstance(rows, dict) or rows_field not in rows:
            raise ValueError(f"the file is not an object with the field `{rows_field}` (rows_field)")
        rows = rows[rows_field]
    if isinstance(rows, dict):
        raise ValueError(
            f"it holds an object with the fields {', '.join(rows) or 'none'}, not a list of rows; rows_field names the "
            "field with the list"
        )
    if not isinstance(rows, list):
        raise ValueError(f"the file holds a {type(rows).__name__}, expected a list of rows")
    yield from rows


def _csv(path: Path, delimiter: str = ",") -> Iterator[Any]:
    csv.field_size_limit(LONGEST_FIELD)
    with _open(path) as file:
        reader = csv.DictReader(file, delimiter=delimiter)
        for row in reader:
            if None in row:  # an unquoted comma would shift the values
                raise ValueError(f"line {reader.line_num} has more values than the header; quote values with commas")
            yield row


def _parquet(path: Path) -> Iterator[Any]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        for batch in file.iter_batches():
            yield from batch.to_pylist()


def _read_saved(folder: Path, split: str, section: str) -> Iterator[Row]:
    import datasets

    try:
        saved = datasets.load_from_disk(str(folder))
    except (OSError, ValueError) as error:
        raise UserError(f"{section}.source: cannot read {folder}: {error}") from error
    if isinstance(saved, datasets.DatasetDict):
        if split not in saved:
            raise UserError(f"{section}.split: {folder} has no split {split!r}; its splits are {', '.join(saved)}")
        saved = saved[split]
    yield from saved


def _read_folder(config: PromptSetConfig, folder: Path, section: str) -> Iterator[Row]:
    """Rows of a folder of data files, laid out like a hub repository."""
    import datasets

    try:
        rows = datasets.load_dataset(str(folder), config.subset, split=config.split)
    except Exception as error:  # as from the hub, dozens of types
        raise UserError(
            f"{section}.source: cannot read the folder {folder} (subset {config.subset!r}, split {config.split!r}): "
            f"{error}"
        ) from error
    yield from rows


def _read_hub(config: PromptSetConfig, section: str) -> Iterator[Row]:
    import datasets  # imported here: it takes seconds, and local files do not need it

    if not can_reach_hub():  # otherwise half a minute of retries for each subset, even of a cached one
        datasets.config.HF_HUB_OFFLINE = True
    subsets = config.subset if isinstance(config.subset, list) else [config.subset]
    kind = f"data set (subset {config.subset!r}, split {config.split!r})"
    with asking_hub(f"{section}.source", config.source, kind, local=f"{', '.join(LOCAL_SUFFIXES)} file"):
        sets = [datasets.load_dataset(config.source, subset, split=config.split) for subset in subsets]
    for rows in sets:
        yield from rows
