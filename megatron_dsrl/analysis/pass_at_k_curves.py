"""Pass@K curves of several evaluations in one figure: one chart per benchmark, one curve per evaluation.

The values are those of each evaluation's `results.json`, unbiased estimates that are means over problems.
"""

from collections.abc import Mapping

from megatron_dsrl.errors import UserError
from megatron_dsrl.evaluation.results_file import EvaluationResults
from megatron_dsrl.observability.charts import SERIES_COLOURS, Chart
from megatron_dsrl.observability.pass_at_k_chart import pass_at_k_chart
from megatron_dsrl.observability.records import Record


def records(evaluations: Mapping[str, EvaluationResults]) -> list[Record]:
    """One record per benchmark, evaluation and K."""
    return [
        {"benchmark": name, "evaluation": label, "k": k, "pass_at_k": value}
        for label, results in evaluations.items()
        for name in results.benchmarks
        for k, value in results.pass_at_k(name).items()
    ]


def table(evaluations: Mapping[str, EvaluationResults]) -> str:
    """Markdown: a row per benchmark and evaluation, Pass@K in percent; an empty cell where a K was not estimated."""
    every_k = sorted({record["k"] for record in records(evaluations)})
    lines = [["benchmark", "evaluation", *(f"Pass@{k}" for k in every_k)], ["---"] * (2 + len(every_k))]
    for name, title in _titles(evaluations).items():
        for label, results in evaluations.items():
            if name in results.benchmarks:
                values = results.pass_at_k(name)
                lines.append([title, label, *(f"{100 * values[k]:.1f}" if k in values else "" for k in every_k)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def charts(evaluations: Mapping[str, EvaluationResults]) -> list[Chart]:
    """A chart per benchmark, a curve per evaluation.

    Raises:
        UserError: there are more evaluations than colours.
    """
    if len(evaluations) > SERIES_COLOURS:
        raise UserError(f"one figure shows at most {SERIES_COLOURS} evaluations, given {len(evaluations)}")
    return [
        pass_at_k_chart(
            f"{title}: Pass@K",
            {label: results.pass_at_k(name) for label, results in evaluations.items() if name in results.benchmarks},
        )
        for name, title in _titles(evaluations).items()
    ]


def _titles(evaluations: Mapping[str, EvaluationResults]) -> dict[str, str]:
    """Of all benchmarks, by name."""
    return {name: one["title"] for results in evaluations.values() for name, one in results.benchmarks.items()}
