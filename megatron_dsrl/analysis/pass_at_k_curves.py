"""Pass@K curves of several evaluations in one figure: one chart per benchmark, one curve per label.

The values are those of each evaluation's `results.json`, unbiased estimates that are means over problems. A label with
several evaluations, one per run, has their mean and Student's 95 % interval over runs.
"""

from collections.abc import Mapping, Sequence

from megatron_dsrl.charts.chart_source import SERIES_COLOURS
from megatron_dsrl.charts.charts import Chart
from megatron_dsrl.charts.estimate import Estimate
from megatron_dsrl.charts.pass_at_k_chart import over_runs, pass_at_k_chart
from megatron_dsrl.common.errors import UserError
from megatron_dsrl.evaluation.results_file import EvaluationResults
from megatron_dsrl.observability.records import Record

Evaluations = Mapping[str, Sequence[EvaluationResults]]
"""By label."""


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
    """Markdown: a row per benchmark and label, Pass@K in percent; an empty cell where a K was not estimated."""
    every_k = sorted({record["k"] for record in records(evaluations)})
    lines = [["benchmark", "evaluation", *(f"Pass@{k}" for k in every_k)], ["---"] * (2 + len(every_k))]
    for name, title in _titles(evaluations).items():
        for label, curve in _curves(evaluations, name).items():
            lines.append([title, label, *(curve[k].in_percent() if k in curve else "" for k in every_k)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def charts(evaluations: Evaluations) -> list[Chart]:
    """A chart per benchmark, a curve per label.

    Raises:
        UserError: there are more labels than colours.
    """
    if len(evaluations) > SERIES_COLOURS:
        raise UserError(f"one figure shows at most {SERIES_COLOURS} evaluations, given {len(evaluations)}")
    return [
        pass_at_k_chart(f"{title}: Pass@K", _curves(evaluations, name)) for name, title in _titles(evaluations).items()
    ]


def _curves(evaluations: Evaluations, benchmark: str) -> dict[str, dict[int, Estimate]]:
    """Of every label that was evaluated on the benchmark."""
    runs = {
        label: [results.pass_at_k(benchmark) for results in of_label if benchmark in results.benchmarks]
        for label, of_label in evaluations.items()
    }
    return {label: over_runs(of_label) for label, of_label in runs.items() if of_label}


def _titles(evaluations: Evaluations) -> dict[str, str]:
    """Of all benchmarks, by name."""
    return {
        name: summary["title"]
        for of_label in evaluations.values()
        for results in of_label
        for name, summary in results.benchmarks.items()
    }
