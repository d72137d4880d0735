"""Pass@K curves of several evaluations in one figure: one chart per benchmark, one curve per label.

The values are those of each evaluation's `results.json`: unbiased estimates, averaged over problems. For a label with
several evaluations, one per run, they are the mean over runs with Student's 95 % interval.
"""

from collections.abc import Mapping, Sequence

from megatron_dsrl.charts.chart_source import SERIES_COLOURS
from megatron_dsrl.charts.charts import Chart
from megatron_dsrl.charts.estimate import Estimate, in_percent, over_runs, pass_at_k_chart
from megatron_dsrl.common.errors import UserError
from megatron_dsrl.common.text import markdown_table
from megatron_dsrl.evaluation.results import EvaluationResults
from megatron_dsrl.observability.records import Record

Evaluations = Mapping[str, Sequence[EvaluationResults]]
"""The evaluations of each label, one per run."""


def records(evaluations: Evaluations) -> list[Record]:
    """One record per benchmark, label and K."""
    return [
        {
            "benchmark": name,
            "evaluation": label,
            "k": k,
            "pass_at_k": estimate.mean,
            "half_width_95": estimate.half_width,
            "runs": len(estimate.values),
        }
        for name in _titles(evaluations)
        for label, curve in _curves(evaluations, name).items()
        for k, estimate in curve.items()
    ]


def table(evaluations: Evaluations) -> str:
    """Markdown with a row per benchmark and label, Pass@K in percent; a cell is empty if K was not estimated."""
    every_k = sorted({record["k"] for record in records(evaluations)})
    rows = [
        [title, label, *(in_percent(curve[k].values) if k in curve else "" for k in every_k)]
        for name, title in _titles(evaluations).items()
        for label, curve in _curves(evaluations, name).items()
    ]
    return markdown_table(["benchmark", "evaluation", *(f"Pass@{k}" for k in every_k)], rows) + "\n"


def charts(evaluations: Evaluations) -> list[Chart]:
    """A chart per benchmark, a curve per label. Raises UserError if there are more labels than colours."""
    if len(evaluations) > SERIES_COLOURS:
        raise UserError(f"one figure shows at most {SERIES_COLOURS} evaluations, got {len(evaluations)}")
    return [
        pass_at_k_chart(f"{title}: Pass@K", _curves(evaluations, name)) for name, title in _titles(evaluations).items()
    ]


def _curves(evaluations: Evaluations, benchmark: str) -> dict[str, dict[int, Estimate]]:
    """The curve of every label that was evaluated on the benchmark."""
    curves = {
        label: [results.pass_at_k(benchmark) for results in runs if benchmark in results.benchmarks]
        for label, runs in evaluations.items()
    }
    return {label: over_runs(values) for label, values in curves.items() if values}


def _titles(evaluations: Evaluations) -> dict[str, str]:
    """Titles of all benchmarks, by name."""
    return {
        name: summary["title"]
        for runs in evaluations.values()
        for results in runs
        for name, summary in results.benchmarks.items()
    }
