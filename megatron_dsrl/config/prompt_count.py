"""How many training prompts a local file holds, without reading it into memory: for the figures before a run."""

import json
from collections.abc import Mapping
from pathlib import Path

from megatron_dsrl.common.errors import UserError
from megatron_dsrl.config.data import PromptSetConfig
from megatron_dsrl.config.made_by import how_to_make

_LOCAL_SUFFIXES = (".jsonl", ".json", ".parquet")


def count_prompts(data: PromptSetConfig, made_by: Mapping[str, str] = {}) -> int | None:
    """Rows of a local file, at most `data.limit`; None for what must be loaded to be counted, such as a hub name.

    Raises UserError when the local file is missing, unreadable or empty.
    """
    path = Path(data.source).expanduser()
    if path.suffix not in _LOCAL_SUFFIXES or "*" in path.name or data.rows_field is not None:
        return None
    if not path.is_file():
        advice = how_to_make(data.source, made_by) or "make it first, or correct the path"
        raise UserError(f"data.source: no such file: {data.source}; {advice}")
    try:
        rows = _count_rows(path)
    except (OSError, ValueError) as error:
        raise UserError(f"data.source: cannot read {data.source}: {error}") from error
    if rows == 0:
        raise UserError(f"data.source: {data.source} holds no rows")
    return rows if data.limit is None else min(rows, data.limit)


def _count_rows(path: Path) -> int:
    if path.suffix == ".parquet":
        import pyarrow.parquet

        return pyarrow.parquet.ParquetFile(path).metadata.num_rows
    with path.open(encoding="utf-8") as file:
        if path.suffix == ".jsonl":
            return sum(1 for line in file if line.strip())
        rows = json.load(file)
    if not isinstance(rows, list):
        raise ValueError("expected a JSON list of rows")
    return len(rows)
