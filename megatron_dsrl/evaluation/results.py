"""The outputs of an evaluation: `results.json`, `results.md` and `pass_at_k.svg`."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any

from megatron_dsrl.charts.chart_source import SERIES_COLOURS
from megatron_dsrl.charts.estimate import over_runs, pass_at_k_chart
from megatron_dsrl.charts.figure import write_figure
from megatron_dsrl.common.disk import replace_text
from megatron_dsrl.common.errors import UserError
from megatron_dsrl.common.text import markdown_table
from megatron_dsrl.config.benchmark import benchmark_names
from megatron_dsrl.evaluation.published import AVERAGE_OF_SIX, DSRL_OVER_GRPO, SIX_BENCHMARKS

RESULTS_FILE = "results.json"
EVALUATIONS_FOLDER = "evaluation"
"""Folder in a run folder for evaluations of the run's policies."""

Summary = Mapping[str, Any]
"""Title, settings and results of one benchmark; see `write_results`."""

RESULT_COLUMNS = (
    "problems", "k", "Avg@k", "95 % interval", "Pass@k", "Maj@k", "tokens", "truncated", "failures",
)  # fmt: skip
AVERAGED_METHODS = tuple(AVERAGE_OF_SIX["Qwen3-4B"])
"""Methods with a published average of the six mathematics benchmarks."""
_NEEDED = ("title", "accuracy", "problems", "samples_per_prompt", "pass_at_k")


@dataclass(frozen=True)
class EvaluationResults:
    """The results of `dsrl eval`."""

    folder: Path
    model: str
    """Folder or hub name of the evaluated model."""
    step: int | None
    """Step of the run that trained the model; None if unknown."""
    benchmarks: dict[str, Summary]
    """Results by benchmark name."""

    def pass_at_k(self, benchmark: str) -> dict[int, float]:
        """Pass@K by K, ascending."""
        values = self.benchmarks[benchmark]["pass_at_k"]
        return dict(sorted((int(k), value) for k, value in values.items()))


def read_results(folder: Path) -> EvaluationResults:
    """Read the results in an output folder of `dsrl eval`. Raises UserError if the folder does not exist or has no
    results."""
    file = folder / RESULTS_FILE
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        benchmarks = dict(data["benchmarks"])
        missing = [f"{name}: {key}" for name, summary in benchmarks.items() for key in _NEEDED if key not in summary]
        if missing:
            raise KeyError(missing[0])
        return EvaluationResults(folder, str(data["model"]), data.get("step"), benchmarks)
    except FileNotFoundError as error:
        problem = f"has no {RESULTS_FILE}" if folder.is_dir() else "does not exist"
        raise UserError(f"{folder} {problem}: give an output folder of `dsrl eval`") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} does not hold the results of `dsrl eval` ({error!r})") from error


def results_of_run(run_folder: Path) -> list[EvaluationResults]:
    """All evaluations in a run folder, by step; those of unknown steps first. UserError if a file is damaged."""
    root = run_folder / EVALUATIONS_FOLDER
    folders = sorted({file.parent for pattern in ("", "*/") for file in root.glob(pattern + RESULTS_FILE)})
    return sorted(map(read_results, folders), key=lambda results: -1 if results.step is None else results.step)


def newest_results(folder: Path) -> EvaluationResults:
    """The results in an output folder of `dsrl eval`, or those of the latest evaluated policy in a run folder. Raises
    UserError if the results are missing or damaged."""
    if not (folder / RESULTS_FILE).is_file() and (evaluations := results_of_run(folder)):
        return evaluations[-1]
    return read_results(folder)


def write_results(folder: Path, model: str, summaries: Mapping[str, Summary], step: int | None = None) -> None:
    """Write all three files. Other benchmarks of the same model that the folder already has are kept.

    Args:
        model: folder or hub name.
        summaries: `title` and the results of `summarise_benchmark`, by benchmark name.
        step: step of the run that trained the model; None for other models.
    """
    summaries = {**_other_results(folder, model, step), **summaries}
    data = {"model": model, "step": step, "benchmarks": summaries, "average_of_six": average_of_six(summaries)}
    replace_text(folder / RESULTS_FILE, json.dumps(data, indent=2) + "\n")
    replace_text(folder / "results.md", markdown(model, summaries))
    curves = {one["title"]: over_runs([one["pass_at_k"]]) for one in summaries.values() if len(one["pass_at_k"]) > 1}
    charts = [
        pass_at_k_chart("Pass@K", dict(islice(curves.items(), first, first + SERIES_COLOURS)))
        for first in range(0, len(curves), SERIES_COLOURS)
    ]
    if charts:
        write_figure(charts, folder / "pass_at_k.svg")


def _other_results(folder: Path, model: str, step: int | None) -> dict[str, Summary]:
    """Results of the same model from earlier evaluations into this folder."""
    if not (folder / RESULTS_FILE).exists():
        return {}
    before = read_results(folder)
    if (before.model, before.step) != (model, step):
        return {}
    # JSON turned the keys of pass_at_k into strings.
    return {name: {**one, "pass_at_k": before.pass_at_k(name)} for name, one in before.benchmarks.items()}


def average_of_six(summaries: Mapping[str, Summary]) -> float | None:
    """Mean Avg@k of the paper's six mathematics benchmarks; None unless all six were evaluated."""
    if not all(name in summaries for name in SIX_BENCHMARKS):
        return None
    return fmean(summaries[name]["accuracy"] for name in SIX_BENCHMARKS)


def markdown(model: str, summaries: Mapping[str, Summary]) -> str:
    """The results as Markdown tables, in percent."""
    lines = [
        f"# {model}",
        "",
        markdown_table(
            ("benchmark", *RESULT_COLUMNS), [(one["title"], *result_cells(one)) for one in summaries.values()]
        ),
        "",
        "Intervals are percentile bootstrap intervals over problems. Pass@k is the unbiased estimate. Maj@k takes the",
        "most frequent answer by its normalised spelling. Failures are samples on which the verifier itself failed.",
        "",
    ]
    if any(name in benchmark_names() for name in summaries):
        lines += _beside_the_paper(summaries)
    return "\n".join(lines)


def _beside_the_paper(summaries: Mapping[str, Summary]) -> list[str]:
    average = average_of_six(summaries)
    measured = "" if average is None else f"{100 * average:.2f}"
    header = ("average of the six mathematics benchmarks, Avg@32", *AVERAGED_METHODS, "this model")
    return [
        "## Compared with the paper (arXiv 2604.14142)",
        "",
        markdown_table(header, [(size, *published_cells(size), measured) for size in AVERAGE_OF_SIX]),
        "",
        "Published differences between DSRL and GRPO, in points: " + "; ".join(_differences()) + ".",
        "",
    ]


def result_cells(summary: Summary) -> tuple[str, ...]:
    """The cells of `RESULT_COLUMNS` for one benchmark; figures in percent."""
    k = summary["samples_per_prompt"]
    interval = summary.get("confidence_interval_95")
    return (
        str(summary["problems"]),
        str(k),
        percent(summary["accuracy"]),
        f"{percent(interval[0])} to {percent(interval[1])}" if interval else "",
        percent({int(number): value for number, value in summary["pass_at_k"].items()}.get(k)),
        percent(summary.get("majority_at_k")),
        f"{summary['mean_tokens']:.0f}",
        f"{percent(summary['truncated_fraction'])} %",
        str(summary.get("verifier_timeouts", 0) + summary.get("verifier_errors", 0)),
    )


def published_cells(size: str) -> list[str]:
    """The published averages of a model size; a cell without one is empty."""
    values = AVERAGE_OF_SIX[size]
    return [f"{values[method]:.2f}" if method in values else "" for method in AVERAGED_METHODS]


def _differences() -> list[str]:
    return [
        f"{size}: " + ", ".join(f"{name} {points:+.2f}" for name, points in by_benchmark.items())
        for size, by_benchmark in DSRL_OVER_GRPO.items()
    ]


def percent(share: float | None) -> str:
    """A share from 0 to 1 in percent with one decimal, without the sign; empty for None."""
    return "" if share is None else f"{100 * share:.1f}"
