"""Output files of an analysis: records as JSON lines, a summary, a figure, and its charts for the report."""

import errno
import json
import os
from collections.abc import Sequence
from pathlib import Path

from megatron_dsrl.charts.charts import Chart, write_charts
from megatron_dsrl.charts.figure import write_figure
from megatron_dsrl.common.disk import write_result
from megatron_dsrl.observability.records import Record, replace_records

FOLDER = "analysis"
"""Name of the folder within a run folder."""
CHARTS_SUFFIX = ".charts.json"


def output_folder(source: Path, asked_for: Path | None) -> Path:
    """Folder of the results: `asked_for`, or `<run>/analysis`, or `<evaluation>/analysis/<benchmark>`."""
    if asked_for is not None:
        return asked_for
    return source / FOLDER if source.is_dir() else source.parent.parent / FOLDER / source.stem


def check_writable(folder: Path) -> None:
    """Create the folder, before hours of work for its files. Raises OSError, with its name, if it cannot be written
    to."""
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))


def write_analysis(
    folder: Path, name: str, records: Sequence[Record], summary: Record, charts: Sequence[Chart]
) -> None:
    """Write `<name>.jsonl`, `<name>.json`, `<name>.svg` and `<name>.charts.json`; the folder is created."""
    folder.mkdir(parents=True, exist_ok=True)
    replace_records(folder / f"{name}.jsonl", list(records))
    write_summary(folder, name, summary, charts)


def write_summary(folder: Path, name: str, summary: Record, charts: Sequence[Chart]) -> None:
    """Write everything but the records; see `write_analysis`."""
    write_result(folder / f"{name}.json", json.dumps(summary, indent=2) + "\n")
    if charts:
        write_figure(charts, folder / f"{name}.svg")
        write_charts(charts, folder / f"{name}{CHARTS_SUFFIX}")


def in_words(summary: Record) -> str:
    """The summary for a terminal: a line per value, and lists of records as tables."""
    lines = []
    for key, value in summary.items():
        if isinstance(value, list):
            lines += ["", f"{_words(key)}:", *_table(value)]
        else:
            lines.append(f"{_words(key)}: {_number(value)}")
    return "\n".join(lines)


def _table(records: Sequence[Record]) -> list[str]:
    if not records:
        return ["  none"]
    rows = [[_words(key) for key in records[0]], *([_number(value) for value in one.values()] for one in records)]
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  " + "  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in rows]


def _words(key: str) -> str:
    return key.replace("_", " ")


def _number(value: object) -> str:
    return "none" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
