"""Rows of a prompt set, from a local file or the hub."""

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from megatron_dsrl.config.data import PromptSetConfig
from megatron_dsrl.errors import UserError

Row = dict[str, Any]

LOCAL_SUFFIXES = (".jsonl", ".json", ".parquet")


def read_rows(config: PromptSetConfig, section: str) -> list[Row]:
    """The rows of a set, at most `config.limit`; never an empty list.

    Raises UserError when the source is missing, unreadable or empty, or holds something else than rows.
    """
    path = Path(config.source).expanduser()
    if path.suffix in LOCAL_SUFFIXES:
        if not path.is_file():
            raise UserError(f"{section}.source: there is no file {config.source}; make it first, or correct the path")
        rows = _read_local(path, section)
    else:
        rows = _read_hub(config, section)
    taken = list(islice(rows, config.limit))
    if not taken:
        raise UserError(f"{section}.source: {config.source} holds no rows")
    return taken


def _read_local(path: Path, section: str) -> Iterator[Row]:
    readers = {".jsonl": _json_lines, ".json": _json_list, ".parquet": _parquet}
    try:
        for index, row in enumerate(readers[path.suffix](path)):
            if not isinstance(row, dict):
                raise ValueError(f"row {index} is a {type(row).__name__}, and an object of fields is needed")
            yield row
    except (OSError, ValueError) as error:  # JSON, Unicode and Arrow errors are ValueErrors
        raise UserError(f"{section}.source: cannot read {path}: {error}") from error


def _json_lines(path: Path) -> Iterator[Any]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"line {number} is not JSON: {error}") from error


def _json_list(path: Path) -> Iterator[Any]:
    rows = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(rows, list):
        raise ValueError(f"the file holds a {type(rows).__name__}, and a list of rows is needed")
    yield from rows


def _parquet(path: Path) -> Iterator[Any]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        for batch in file.iter_batches():
            yield from batch.to_pylist()


def _read_hub(config: PromptSetConfig, section: str) -> Iterator[Row]:
    import datasets  # imported here: it takes seconds, and local files do not need it

    try:
        rows = datasets.load_dataset(config.source, config.subset, split=config.split)
    except Exception as error:  # the hub client raises many kinds, all of them about the name or the network
        raise UserError(
            f"{section}.source: {config.source!r} is neither a local {', '.join(LOCAL_SUFFIXES)} file nor a data set "
            f"that the hub gives (subset {config.subset!r}, split {config.split!r}): {type(error).__name__}: {error}"
        ) from error
    yield from rows
