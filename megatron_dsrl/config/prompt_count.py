"""How many training prompts a local file holds, without reading it into memory: for the figures before a run."""

import json
from collections.abc import Mapping
from itertools import repeat
from pathlib import Path

from megatron_dsrl.common.errors import UserError
from megatron_dsrl.config.data import DataConfig, PromptSetConfig
from megatron_dsrl.config.made_by import how_to_make

_LOCAL_SUFFIXES = (".jsonl", ".json", ".parquet")


def count_prompts(data: PromptSetConfig, made_by: Mapping[str, str] = {}, section: str = "data") -> int | None:
    """Rows of a local file, at most `data.limit`; None for what must be loaded to be counted, such as a hub name.

    Raises UserError when the local file is missing, unreadable or empty.
    """
    path = Path(data.source).expanduser()
    if path.suffix not in _LOCAL_SUFFIXES or "*" in path.name or data.rows_field is not None:
        return None
    if not path.is_file():
        advice = how_to_make(data.source, made_by) or "make it first, or correct the path"
        raise UserError(f"{section}.source: no such file: {data.source}; {advice}")
    try:
        rows = _count_rows(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{section}.source: cannot read {data.source}: {error}") from error
    if rows == 0:
        raise UserError(f"{section}.source: {data.source} holds no rows")
    return rows if data.limit is None else min(rows, data.limit)


def count_training_prompts(data: DataConfig, made_by: Mapping[str, str] = {}) -> int | None:
    """As `count_prompts`; None also for a mixture, whose sets have their own epochs, and for filtered prompts."""
    sections = ["data", *(f"data.mixed_with.{position}" for position in range(len(data.mixed_with)))]
    counts = [count_prompts(*each) for each in zip(data.sets, repeat(made_by), sections)]  # all must exist
    return None if len(counts) > 1 or data.filters_by_pass_rate else counts[0]


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
