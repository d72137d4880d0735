"""Results of `dsrl analyse` in a run folder: summaries as figures and tables, and charts."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_dsrl.analysis.outputs import CHARTS_SUFFIX, FOLDER
from megatron_dsrl.charts.chart_source import number
from megatron_dsrl.charts.charts import Chart, read_charts
from megatron_dsrl.common.errors import UserError
from megatron_dsrl.evaluation.results import EVALUATIONS_FOLDER
from megatron_dsrl.report.parts import Figure, Table

TITLES = {
    "gradients": "Gradients of log P(y) and log P(y|x)",
    "thoughts": "Transition and reflection thoughts",
    "problems": "Solved problems",
    "lengths": "Response length and entropy",
    "behaviours": "Four behaviours, by a judge",
}
"""In the page's order; analyses of other kinds come after them under their own names."""


@dataclass(frozen=True)
class ShownAnalysis:
    """One analysis as the page shows it."""

    title: str
    figures: list[Figure]
    tables: list[tuple[str, Table]]
    """With their names."""
    charts: list[Chart]


def read_analyses(run_folder: Path) -> list[ShownAnalysis]:
    """Analyses of the run's rollouts, then of its evaluations' samples.

    Raises:
        UserError: a file is damaged.
    """
    found = [_read(file, "") for file in _summaries(run_folder / FOLDER)]
    for folder in sorted((run_folder / EVALUATIONS_FOLDER).glob(f"**/{FOLDER}/*/")):
        source = f" on {folder.name} ({folder.parent.parent.name})"
        found += [_read(file, source) for file in _summaries(folder)]
    return found


def _summaries(folder: Path) -> list[Path]:
    """The summary files of a folder in the page's order."""
    order = list(TITLES)
    files = [file for file in folder.glob("*.json") if not file.name.endswith(CHARTS_SUFFIX)]
    return sorted(files, key=lambda file: (order.index(file.stem) if file.stem in TITLES else len(order), file.stem))


def _read(file: Path, source: str) -> ShownAnalysis:
    try:
        summary = dict(json.loads(file.read_text(encoding="utf-8")))
        tables = [(_words(key), _table(value)) for key, value in summary.items() if isinstance(value, list) and value]
    except (ValueError, TypeError, AttributeError) as error:
        advice = "delete it, or run the analysis again"
        raise UserError(f"{file} is not the summary of an analysis ({error!r}); {advice}") from error
    charts = file.with_name(file.stem + CHARTS_SUFFIX)
    return ShownAnalysis(
        title=TITLES.get(file.stem, _words(file.stem)) + source,
        figures=_figures({key: value for key, value in summary.items() if not isinstance(value, list)}),
        tables=tables,
        charts=read_charts(charts) if charts.is_file() else [],
    )


def _figures(summary: dict[str, Any]) -> list[Figure]:
    """A figure per entry; `x_first` and `x_last` together as one, between the steps that they are of."""
    note = "first → last"
    if "first_step" in summary and "last_step" in summary:
        note = f"step {summary.pop('first_step')} → step {summary.pop('last_step')}"
    figures = []
    for key, value in summary.items():
        name = key.removesuffix("_first")
        if key.endswith("_first") and f"{name}_last" in summary:
            figures.append(Figure(_words(name), f"{_value(value)} → {_value(summary[f'{name}_last'])}", note))
        elif not (key.endswith("_last") and f"{key.removesuffix('_last')}_first" in summary):
            figures.append(Figure(_words(key), _value(value)))
    return figures


def _table(records: list[dict[str, Any]]) -> Table:
    header = tuple(records[0])
    rows = tuple(tuple(_value(record.get(key)) for key in header) for record in records)
    return Table(tuple(map(_words, header)), rows)


def _value(value: Any) -> str:
    return number(value) if value is None or isinstance(value, int | float) else str(value)


def _words(key: str) -> str:
    words = key.replace("_", " ")
    return words[:1].upper() + words[1:]
