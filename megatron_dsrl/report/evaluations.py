"""What was measured after a run: results of `dsrl eval` as tables and Pass@K curves, and those of `dsrl analyse`."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_dsrl.analysis.outputs import CHARTS_SUFFIX, FOLDER
from megatron_dsrl.charts.chart_source import SERIES_COLOURS, number
from megatron_dsrl.charts.charts import Chart, read_charts
from megatron_dsrl.charts.estimate import over_runs, pass_at_k_chart
from megatron_dsrl.common.errors import UserError
from megatron_dsrl.evaluation.published import AVERAGE_OF_SIX, OUT_OF_DISTRIBUTION, SIX_BENCHMARKS
from megatron_dsrl.evaluation.results import (
    AVERAGED_METHODS,
    EVALUATIONS_FOLDER,
    RESULT_COLUMNS,
    EvaluationResults,
    average_of_six,
    published_cells,
    result_cells,
)
from megatron_dsrl.report.run_figures import Figure, Table

Evaluations = Mapping[str, EvaluationResults]
"""Keyed by the name shown on the page."""
TITLES = {
    "gradients": "Gradients of log P(y) and log P(y|x)",
    "thoughts": "Transition and reflection thoughts",
    "problems": "Solved problems",
    "lengths": "Response length and entropy",
    "behaviours": "Four behaviours, by a judge",
}
"""In the page's order; analyses of other kinds come after them under their own names."""


def named_by_step(evaluations: Sequence[EvaluationResults]) -> dict[str, EvaluationResults]:
    """Evaluations of one run by step, or by model if a step is unknown or was evaluated twice."""
    steps = [results.step for results in evaluations]
    return {
        results.model if results.step is None or steps.count(results.step) > 1 else f"step {results.step}": results
        for results in evaluations
    }


def results_table(evaluations: Evaluations) -> Table:
    """A row per benchmark and evaluation; figures in percent."""
    rows = [
        (title, name, *result_cells(results.benchmarks[benchmark]))
        for benchmark, title in _titles(evaluations).items()
        for name, results in evaluations.items()
        if benchmark in results.benchmarks
    ]
    return Table(("benchmark", "policy", *RESULT_COLUMNS), tuple(rows))


def paper_table(evaluations: Evaluations) -> Table | None:
    """The averages of the six mathematics benchmarks beside the paper's; None unless one of its benchmarks is there."""
    if not any(name in SIX_BENCHMARKS or name in OUT_OF_DISTRIBUTION for name in _titles(evaluations)):
        return None
    published = [(f"{size}, paper", *published_cells(size), "") for size in AVERAGE_OF_SIX]
    own = [
        (name, *("" for _ in AVERAGED_METHODS), "" if average is None else f"{100 * average:.2f}")
        for name, results in evaluations.items()
        for average in [average_of_six(results.benchmarks)]
    ]
    return Table(("average of the six, Avg@32", *AVERAGED_METHODS, "here"), (*published, *own))


def pass_at_k_charts(evaluations: Evaluations) -> list[Chart]:
    """A chart per benchmark with a curve per evaluation: the latest ones if there are more than colours."""
    latest, charts = dict(list(evaluations.items())[-SERIES_COLOURS:]), []
    for benchmark, title in _titles(latest).items():
        curves = {
            name: over_runs([results.pass_at_k(benchmark)])
            for name, results in latest.items()
            if benchmark in results.benchmarks
        }
        if any(len(by_k) > 1 for by_k in curves.values()):
            charts.append(pass_at_k_chart(f"{title}: Pass@K", curves))
    return charts


def _titles(evaluations: Evaluations) -> dict[str, str]:
    """All benchmarks by name."""
    return {name: one["title"] for results in evaluations.values() for name, one in results.benchmarks.items()}


@dataclass(frozen=True)
class ShownAnalysis:
    """One analysis as the page shows it."""

    title: str
    figures: list[Figure]
    tables: list[tuple[str, Table]]
    """With their names."""
    charts: list[Chart]


def read_analyses(run_folder: Path) -> list[ShownAnalysis]:
    """Analyses of the run's rollouts, then of its evaluations' samples. Raises UserError if a file is damaged."""
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
