"""Methods compared over several runs (seeds) each: a table of held-out results, and learning curves; and the learning
curve of one run alone.

The run is the unit: a method's figure is the mean over its runs, its interval is Student's t over them, and two methods
are compared by Welch's t-test of their accuracy on each set. With few runs the intervals are wide, as they should be.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev

from scipy import stats

from megatron_dsrl.charts.chart_source import SERIES_COLOURS, WIDE, ChartSource, Series, ValueAxis
from megatron_dsrl.charts.charts import Chart, draw, line_chart
from megatron_dsrl.charts.estimate import estimated_series, in_percent, over_runs
from megatron_dsrl.charts.figure import write_figure
from megatron_dsrl.common.disk import write_result
from megatron_dsrl.common.errors import UserError
from megatron_dsrl.common.text import markdown_table
from megatron_dsrl.observability.run_records import RunRecords, read_run, with_common_colours
from megatron_dsrl.provenance.differences import compare_runs, starts_that_count
from megatron_dsrl.report.training_charts import accuracy_series

TABLE_FILE = "comparison.md"
FIGURE_FILE = "comparison.svg"
METHOD_COLOUR, BASELINE_COLOUR = 1, 6
REWARD_COLOUR = SERIES_COLOURS
"""Grey, because the reward is secondary to the accuracy."""
SHARE = ValueAxis("accuracy", at_least=0.0, at_most=1.0)


def welch_p_value(one: Sequence[float], other: Sequence[float]) -> float | None:
    """Two-sided p-value of Welch's t-test; None if a side has a single value or neither varies."""
    if min(len(one), len(other)) < 2 or (stdev(one) == 0 and stdev(other) == 0):
        return None
    return float(stats.ttest_ind(one, other, equal_var=False).pvalue)


def write_comparison(methods: Mapping[str, Sequence[Path]], baseline: str, folder: Path) -> str:
    """Write `comparison.md` and `comparison.svg`, and return the table. Raises UserError if a folder is not a run
    folder, or nothing was evaluated.

    Args:
        methods: run folders by method, in the order of the table.
        baseline: the method that the others are tested against.
        folder: where the files go.
    """
    runs = {method: [read_run(path) for path in folders] for method, folders in methods.items()}
    table = comparison_table(runs, baseline) + provenance_table(runs)
    write_result(folder / TABLE_FILE, table)
    if charts := learning_curves(runs, baseline):
        write_figure(charts, folder / FIGURE_FILE)
    return table


def comparison_table(runs: Mapping[str, Sequence[RunRecords]], baseline: str) -> str:
    """Markdown: a row per method with its last held-out results, and before them the base model."""
    sets = _set_names(runs)
    columns = [(name, metric) for name in sets for metric in _metrics(runs, name)]
    titles = [f"{metric} on {name}, %" for name, metric in columns]
    tests = [f"p against {baseline}" if len(sets) == 1 else f"p against {baseline} on {name}" for name in sets]
    header = ["method", "runs", *titles, *tests, "response tokens"]
    before = [in_percent(_first_values(runs, *column)) for column in columns]
    rows = [["before training", "", *before, *([""] * len(sets)), ""]]
    for method, of_method in runs.items():
        lengths = [length for run in of_method for length in run.column("response/mean_tokens")[-1:] if length]
        rows.append(
            [
                method,
                str(len(of_method)),
                *(in_percent(_last_values(of_method, *column)) for column in columns),
                *("" if method == baseline else _test(of_method, runs[baseline], name) for name in sets),
                f"{fmean(lengths):.1f}" if lengths else "",
            ]
        )
    interval = "± is half of the 95 % interval over runs (Student's t)."
    test = "p: Welch's t-test of accuracy, not corrected for several tests."
    return f"{markdown_table(header, rows)}\n\n{interval} {test}\n"


def provenance_table(runs: Mapping[str, Sequence[RunRecords]]) -> str:
    """Markdown: what produced the runs, first what is the same in all of them, then what differs, with a row for each
    method; empty if no run has recorded it."""
    starts = {
        method: [starts_that_count(run.folder, run.steps[-1]["step"] if run.steps else 0) for run in of_method]
        for method, of_method in runs.items()
    }
    if not any(one for of_method in starts.values() for one in of_method):
        return ""
    facts = compare_runs([one for of_method in starts.values() for one in of_method])
    same = [[fact.name, fact.values[0]] for fact in facts if not fact.differs]
    table = f"\n{markdown_table(['produced by', 'all runs'], same)}\n"
    if differing := [fact for fact in facts if fact.differs]:
        values = [iter(fact.values) for fact in differing]
        rows = [
            [method, *("; ".join(dict.fromkeys(next(value) for _ in of_method)) for value in values)]
            for method, of_method in starts.items()
        ]
        table += f"\n{markdown_table(['differs', *(fact.name for fact in differing)], rows)}\n"
    return table


def learning_curves(runs: Mapping[str, Sequence[RunRecords]], baseline: str) -> list[Chart]:
    """One chart per method and held-out set: its accuracy over steps, mean and interval, with the baseline's.

    The baseline's curve, and the shading of a phase, have the same colour in all charts. A method that was not
    evaluated on a set has no chart for it.
    """
    shaded = with_common_colours([of_method[0] for of_method in runs.values()])
    phases = {method: run.phases for method, run in zip(runs, shaded, strict=True)}
    charts, sets = [], _set_names(runs)
    for name in sets:
        against = _curve(baseline, runs[baseline], name, BASELINE_COLOUR)
        for method, of_method in runs.items():
            curves = [against] if method == baseline else [_curve(method, of_method, name, METHOD_COLOUR), against]
            if curves[0].steps:
                title = f"{method}: accuracy on {name}" if len(sets) > 1 else method
                charts.append(line_chart(title, f"{len(of_method)} runs", curves, phases[method], _axis(runs, name)))
    return charts


def _curve(method: str, runs: Sequence[RunRecords], name: str, colour: int) -> Series:
    """Mean accuracy and interval at the steps that all runs with this set have evaluated."""
    by_run = [
        {record["step"]: record["accuracy"] for record in run.evaluations[name] if record["accuracy"] is not None}
        for run in runs
        if name in run.evaluations
    ]
    return estimated_series(method, over_runs(by_run), colour)


def _set_names(runs: Mapping[str, Sequence[RunRecords]]) -> list[str]:
    names = list(dict.fromkeys(name for of_method in runs.values() for run in of_method for name in run.evaluations))
    if not names:
        raise UserError("the runs have no evaluations to compare; set evaluation.sets and train, then compare again")
    return names


def _metrics(runs: Mapping[str, Sequence[RunRecords]], name: str) -> list[str]:
    """`accuracy`, and pass@k and majority@k of all samples."""
    records = [run.evaluations[name][-1] for of_method in runs.values() for run in of_method if name in run.evaluations]
    of_all_samples = {
        key for record in records for key in record if key.endswith(f"@{record.get('samples_per_prompt')}")
    }
    return ["accuracy", *sorted(of_all_samples)]


def _first_values(runs: Mapping[str, Sequence[RunRecords]], name: str, metric: str) -> list[float]:
    """Before training, once per seed: all methods of a seed start from one model and sample with the same seeds."""
    first = {
        run.config.get("seed"): run.evaluations[name][0].get(metric)
        for of_method in runs.values()
        for run in of_method
        if name in run.evaluations and run.evaluations[name][0]["step"] == 0
    }
    return [value for value in first.values() if value is not None]


def _last_values(runs: Sequence[RunRecords], name: str, metric: str) -> list[float]:
    values = [run.evaluations[name][-1].get(metric) for run in runs if name in run.evaluations]
    return [value for value in values if value is not None]


def _test(one: Sequence[RunRecords], other: Sequence[RunRecords], name: str) -> str:
    p_value = welch_p_value(_last_values(one, name, "accuracy"), _last_values(other, name, "accuracy"))
    return "" if p_value is None else f"{p_value:.2g}"


def _axis(runs: Mapping[str, Sequence[RunRecords]], name: str) -> ValueAxis:
    """One scale for all charts, so that they can be compared: up to the next tenth above the highest accuracy."""
    accuracies = [
        record["accuracy"] or 0.0
        for of_method in runs.values()
        for run in of_method
        for record in run.evaluations.get(name, [])
    ]
    top = min(1.0, 0.1 * math.ceil(10 * max(accuracies) + 0.5))
    return ValueAxis("accuracy", at_least=0.0, at_most=top, include=(0.0, top))


def write_learning_curve(run_folder: Path, path: Path) -> Path:
    """Write an SVG file, which follows the reader's light or dark colour scheme, and return its path. Raises UserError
    if the folder is not a run folder, or neither an evaluation nor a reward was recorded."""
    chart = learning_curve(read_run(run_folder))
    write_figure([chart], path)
    return path


def learning_curve(run: RunRecords) -> Chart:
    """Accuracy on every held-out set with its standard error, and the mean reward of each step's samples.

    With accuracies on the axis, rewards beyond 0 to 1 are left out.
    """
    accuracies = [
        accuracy_series(f"accuracy on {name}", records, index % (SERIES_COLOURS - 1) + 1)
        for index, (name, records) in enumerate(run.evaluations.items())
    ]
    known = run.known("reward/mean")
    is_share = bool(known) and min(known) >= 0 and max(known) <= 1
    rewards = []
    if known and (is_share or not accuracies):
        rewards = [Series("reward of the samples", run.step_numbers, run.column("reward/mean"), REWARD_COLOUR)]
    if not accuracies and not rewards:
        raise UserError(f"{run.folder} has no evaluation and no reward yet, so no curve can be drawn")
    axis = SHARE if is_share or accuracies else ValueAxis("reward")
    return draw(ChartSource("lines", run.name, "", (*accuracies, *rewards), tuple(run.phases), axis), WIDE)
