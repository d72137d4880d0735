"""Results of `dsrl eval`, as tables and Pass@K curves."""

from collections.abc import Mapping, Sequence

from megatron_dsrl.charts.chart_source import SERIES_COLOURS
from megatron_dsrl.charts.charts import Chart
from megatron_dsrl.charts.pass_at_k_chart import over_runs, pass_at_k_chart
from megatron_dsrl.evaluation.published import AVERAGE_OF_SIX, OUT_OF_DISTRIBUTION, SIX_BENCHMARKS
from megatron_dsrl.evaluation.results import (
    AVERAGED_METHODS,
    RESULT_COLUMNS,
    EvaluationResults,
    average_of_six,
    published_cells,
    result_cells,
)
from megatron_dsrl.report.parts import Table

Evaluations = Mapping[str, EvaluationResults]
"""Keyed by the name shown on the page."""


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
    latest = dict(list(evaluations.items())[-SERIES_COLOURS:])
    curves = {
        benchmark: {
            name: over_runs([results.pass_at_k(benchmark)])
            for name, results in latest.items()
            if benchmark in results.benchmarks
        }
        for benchmark in _titles(latest)
    }
    titles = _titles(latest)
    return [
        pass_at_k_chart(f"{titles[benchmark]}: Pass@K", of_benchmark)
        for benchmark, of_benchmark in curves.items()
        if any(len(values) > 1 for values in of_benchmark.values())
    ]


def _titles(evaluations: Evaluations) -> dict[str, str]:
    """All benchmarks by name."""
    return {name: one["title"] for results in evaluations.values() for name, one in results.benchmarks.items()}
