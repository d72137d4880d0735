"""The paper's results table with our own measurements; cells without a measurement are empty.

A cell is the mean over a method's evaluations (one per run), with half of Student's 95 % interval over runs if there
are several. Differences between two methods are over the same problems; their interval is a paired bootstrap over
problems, which does not cover other seeds (`dsrl compare` tests over runs).
"""

from collections.abc import Mapping, Sequence
from statistics import fmean

from megatron_dsrl.charts.estimate import in_percent
from megatron_dsrl.common.errors import UserError
from megatron_dsrl.common.text import markdown_table
from megatron_dsrl.evaluation import published
from megatron_dsrl.evaluation.metrics import bootstrap_interval
from megatron_dsrl.evaluation.results import EvaluationResults, average_of_six
from megatron_dsrl.evaluation.sample_file import read_sample_file

Evaluations = Mapping[str, Sequence[EvaluationResults]]
"""The evaluations of every run, by method."""


def paper_table(evaluations: Evaluations, size: str) -> str:
    """The table in Markdown. Raises UserError if the paper has no such size, or a sample file is damaged.

    Args:
        evaluations: methods named as in the paper (`published.METHODS`) fill its rows, others get new rows.
        size: model size of the published results to show, such as `Qwen3-4B`.
    """
    if size not in published.AVERAGE_OF_SIX:
        raise UserError(f"--size: the paper reports {' and '.join(published.AVERAGE_OF_SIX)}, not {size}")
    as_in_the_paper = {name.lower(): name for name in published.METHODS}
    evaluations = {as_in_the_paper.get(method.lower(), method): runs for method, runs in evaluations.items()}
    methods = [*published.METHODS, *(method for method in evaluations if method not in published.METHODS)]
    others = {
        name: summary["title"]
        for runs in evaluations.values()
        for results in runs
        for name, summary in results.benchmarks.items()
        if name not in published.SIX_BENCHMARKS and name not in published.OUT_OF_DISTRIBUTION
    }
    parts = [
        f"# Results beside the paper's (arXiv 2604.14142), {size}",
        f"Percent; mathematics: Avg@{published.SAMPLES_ON_SIX}. The column *average, paper* and the row *paper* were "
        "published, everything else was measured here. An empty cell was not measured, or not published.",
        _mathematics(evaluations, methods, size),
        "## Out of distribution",
        _accuracies(evaluations, methods, published.OUT_OF_DISTRIBUTION),
        "## DSRL over GRPO, in points",
        _differences(evaluations, size),
        "Intervals of measured differences are 95 % paired bootstrap intervals over problems.",
    ]
    if others:
        parts += ["## Other benchmarks", _accuracies(evaluations, list(evaluations), others)]
    if notes := _departures(evaluations):
        parts += ["## Different from the paper", "\n".join(f"- {note}" for note in notes)]
    return "\n\n".join(parts) + "\n"


def _mathematics(evaluations: Evaluations, methods: Sequence[str], size: str) -> str:
    header = ["method", *published.SIX_BENCHMARKS.values(), "average", "average, paper"]
    rows = []
    for method in methods:
        averages = [average_of_six(results.benchmarks) for results in evaluations.get(method, ())]
        in_the_paper = published.AVERAGE_OF_SIX[size].get(method)
        rows.append(
            [
                method,
                *(in_percent(_values(evaluations, method, name)) for name in published.SIX_BENCHMARKS),
                in_percent([average for average in averages if average is not None]),
                "" if in_the_paper is None else f"{in_the_paper:.2f}",
            ]
        )
    return markdown_table(header, rows)


def _accuracies(evaluations: Evaluations, methods: Sequence[str], benchmarks: Mapping[str, str]) -> str:
    rows = [[method, *(in_percent(_values(evaluations, method, name)) for name in benchmarks)] for method in methods]
    return markdown_table(["method", *benchmarks.values()], rows)


def _differences(evaluations: Evaluations, size: str) -> str:
    benchmarks = published.SIX_BENCHMARKS | published.OUT_OF_DISTRIBUTION
    gap = published.AVERAGE_OF_SIX[size]["DSRL"] - published.AVERAGE_OF_SIX[size]["GRPO"]
    paper = published.DSRL_OVER_GRPO[size]
    return markdown_table(
        ["", *benchmarks.values(), "average of six"],
        [
            [
                "measured",
                *(_difference(evaluations, name) for name in benchmarks),
                _difference_of_averages(evaluations),
            ],
            ["paper", *(f"{paper[name]:+.2f}" if name in paper else "" for name in benchmarks), f"{gap:+.2f}"],
        ],
    )


def _difference(evaluations: Evaluations, benchmark: str) -> str:
    """DSRL minus GRPO, with an interval if both have samples of the same problems."""
    ours, theirs = (_values(evaluations, method, benchmark) for method in ("DSRL", "GRPO"))
    if not ours or not theirs:
        return ""
    difference = f"{100 * (fmean(ours) - fmean(theirs)):+.1f}"
    by_problem = [_means_of_problems(evaluations[method], benchmark) for method in ("DSRL", "GRPO")]
    if not by_problem[0] or by_problem[0].keys() != by_problem[1].keys():
        return difference
    interval = bootstrap_interval([by_problem[0][key] - by_problem[1][key] for key in by_problem[0]])
    return difference if interval is None else f"{difference} ({100 * interval[0]:+.1f} to {100 * interval[1]:+.1f})"


def _difference_of_averages(evaluations: Evaluations) -> str:
    means = []
    for method in ("DSRL", "GRPO"):
        averages = [average_of_six(results.benchmarks) for results in evaluations.get(method, ())]
        measured = [average for average in averages if average is not None]
        if not measured or len(measured) < len(averages):
            return ""
        means.append(fmean(measured))
    return f"{100 * (means[0] - means[1]):+.1f}"


def _means_of_problems(runs: Sequence[EvaluationResults], benchmark: str) -> dict[tuple[int, str], float]:
    """Mean reward over all runs by problem (row number and gold answer); empty if samples are missing."""
    rewards: dict[tuple[int, str], list[float]] = {}
    for results in runs:
        file = results.folder / "samples" / f"{benchmark}.jsonl"
        if benchmark in results.benchmarks and not file.is_file():
            return {}
        for problem in read_sample_file(file) if benchmark in results.benchmarks else ():
            mean = fmean(sample.reward for sample in problem.samples)
            rewards.setdefault((problem.index, problem.answer), []).append(mean)
    return {problem: fmean(means) for problem, means in rewards.items()}


def _departures(evaluations: Evaluations) -> list[str]:
    """How measured results differ from the paper's in samples, temperature or problems."""
    notes = []
    for method, runs in evaluations.items():
        for results in runs:
            for name, summary in results.benchmarks.items():
                departures = []
                if name in published.SIX_BENCHMARKS and summary["samples_per_prompt"] != published.SAMPLES_ON_SIX:
                    departures.append(f"{summary['samples_per_prompt']} samples per problem")
                if name in published.SIX_BENCHMARKS and summary.get("temperature", 1.0) != 1.0:
                    departures.append(f"temperature {summary['temperature']:g}")
                if summary.get("limit") is not None:
                    departures.append(f"only the first {summary['problems']} problems")
                if departures:
                    notes.append(f"{method}, {summary['title']} ({results.folder}): {', '.join(departures)}")
    return notes


def _values(evaluations: Evaluations, method: str, benchmark: str) -> list[float]:
    """Accuracy of every run that was evaluated on the benchmark."""
    runs = evaluations.get(method, ())
    return [results.benchmarks[benchmark]["accuracy"] for results in runs if benchmark in results.benchmarks]
