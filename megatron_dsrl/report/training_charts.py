"""The charts of a training that the report shows, for one run and for several, and a run's learning curve as a file."""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from megatron_dsrl.charts.chart_source import SERIES_COLOURS, WIDE, ChartSource, Series, ValueAxis, phase_changes
from megatron_dsrl.charts.charts import Chart, draw, line_chart, stacked_chart
from megatron_dsrl.charts.figure import write_figure
from megatron_dsrl.common.errors import UserError
from megatron_dsrl.common.numbers import is_number
from megatron_dsrl.observability.records import Record
from megatron_dsrl.observability.run_records import PhaseSpan, RunRecords, read_run
from megatron_dsrl.report.curves import (
    COST,
    GROUP_KEYS,
    HEALTH,
    MIXED_GROUPS,
    NAT,
    OF_THE_UPDATE,
    PARTS_OF_A_STEP,
    PROMPTS,
    REWARD,
    SPACES,
    STEP_SECONDS,
    Curves,
)
from megatron_dsrl.report.run_figures import Table

PERCENT = ValueAxis("accuracy, %", at_least=0.0, at_most=100.0)
SHARE = ValueAxis("accuracy", at_least=0.0, at_most=1.0)
REWARD_COLOUR = SERIES_COLOURS
"""Grey, because the reward is secondary to the accuracy."""
WHOLE = "seconds/step"


def run_charts(run: RunRecords) -> list[tuple[str, list[Chart | str]]]:
    """Headed sections of charts; a chart without data is replaced by a sentence. Needs at least one step."""
    learning = [_accuracy_of_run(run), _run_chart(run, REWARD), _groups_chart(run)]
    if run.held_out_losses or any(value is not None for value in run.column("data/epoch")):
        learning = [_held_out_loss_chart(run)]
    return [
        ("Learning", learning),
        ("Policy", [_run_chart(run, curves) for curves in HEALTH]),
        ("Time", [_seconds_chart(run), *(_run_chart(run, curves) for curves in COST)]),
    ]


def comparison_charts(runs: Sequence[RunRecords]) -> list[tuple[str, list[Chart | str]]]:
    """The same sections with one curve per run, in the same colour in all charts."""
    return [
        ("Learning", [*_accuracy_of_runs(runs), _compare(runs, REWARD), _compare(runs, MIXED_GROUPS)]),
        ("Policy", [_compare(runs, curves) for curves in HEALTH]),
        ("Time", [_compare(runs, STEP_SECONDS), *(_compare(runs, curves) for curves in COST)]),
    ]


def accuracy_series(name: str, records: Sequence[Record], colour: int, scale: float = 1.0) -> Series:
    """Held-out accuracy times `scale` with its standard error, over the evaluated steps."""

    def column(key: str) -> tuple[float | None, ...]:
        return tuple(None if record[key] is None else scale * record[key] for record in records)

    steps = tuple(record["step"] for record in records)
    return Series(name, steps, column("accuracy"), colour, column("standard_error"))


def _accuracy_of_run(run: RunRecords) -> Chart | str:
    """One curve per set."""
    sets = enumerate(run.evaluations.items())
    return _accuracy_chart(
        "Held-out accuracy",
        [accuracy_series(name, records, index % SERIES_COLOURS + 1, 100) for index, (name, records) in sets],
        run.phases,
    )


def _held_out_loss_chart(run: RunRecords) -> Chart | str:
    """One curve per set of supervised training, beside the loss of each step's batch."""
    series = [Series("training batches", run.step_numbers, run.column("policy/loss"), SERIES_COLOURS)]
    for index, (name, records) in enumerate(run.held_out_losses.items()):
        steps = tuple(record["step"] for record in records)
        losses, errors = (tuple(record[key] for record in records) for key in ("loss", "loss_standard_error"))
        series.append(Series(name, steps, losses, index % (SERIES_COLOURS - 1) + 1, errors))
    explanation = "Negative log-likelihood of the responses; ± one standard error. Step 0 is the base model."
    return line_chart("Loss on held-out responses", explanation, series, run.phases, NAT)


def _accuracy_of_runs(runs: Sequence[RunRecords]) -> list[Chart | str]:
    """A chart per set with one curve per run."""
    names = list(dict.fromkeys(name for run in runs for name in run.evaluations))
    if not names:
        return [_accuracy_chart("", [], [])]
    return [
        _accuracy_chart(
            f"Accuracy on {name}",
            [
                accuracy_series(run.name, run.evaluations[name], _colour(index), 100)
                for index, run in enumerate(runs)
                if name in run.evaluations
            ],
            [],
        )
        for name in names
    ]


def _accuracy_chart(title: str, series: Sequence[Series], phases: Sequence[PhaseSpan]) -> Chart | str:
    if not series:
        return "No evaluation was recorded."
    explanation = "On problems that are not trained on; ± one standard error. Step 0 is the base model."
    return line_chart(title, explanation, series, phases, PERCENT)


def _run_chart(run: RunRecords, curves: Curves) -> Chart | str:
    if curves.is_of_the_update:
        ((name, key, colour),) = curves.keys
        series = _by_space(run, name, key, colour)
    else:
        series = [Series(name, run.step_numbers, run.column(key), colour) for name, key, colour in curves.keys]
    return _lines(curves, series, run.phases)


def _by_space(run: RunRecords, name: str, key: str, colour: int) -> list[Series]:
    """A curve per space that the run trained in, which begins again with every phase."""
    spaces = [str(record.get("space")) for record in run.steps]
    breaks = phase_changes(run.phases)
    if len(set(spaces)) == 1:
        return [Series(name, run.step_numbers, run.column(key), colour, breaks=breaks)]
    series = []
    for space in dict.fromkeys(spaces):
        words, colour_of_space = SPACES.get(space, (f"space {space}", SERIES_COLOURS))
        values = tuple(value if at == space else None for at, value in zip(spaces, run.column(key), strict=True))
        series.append(Series(f"{name} of {words}", run.step_numbers, values, colour_of_space, breaks=breaks))
    return series


def _compare(runs: Sequence[RunRecords], curves: Curves) -> Chart | str:
    """One curve per run, of the first key."""
    key = curves.keys[0][1]
    series = [
        Series(
            run.name,
            run.step_numbers,
            run.column(key),
            _colour(index),
            breaks=phase_changes(run.phases) if curves.is_of_the_update else (),
        )
        for index, run in enumerate(runs)
    ]
    return _lines(curves, series, [])


def _colour(index: int) -> int:
    """The colour of a run by its place in the comparison."""
    return index % SERIES_COLOURS + 1


def _lines(curves: Curves, series: Sequence[Series], phases: Sequence[PhaseSpan]) -> Chart | str:
    if not any(one.known() for one in series):
        return f"{curves.title}: {curves.absent}"
    return line_chart(curves.title, curves.explanation, series, phases, curves.axis)


def _groups_chart(run: RunRecords) -> Chart | str:
    series = [Series(name, run.step_numbers, run.column(key), colour) for name, key, colour in GROUP_KEYS]
    if not any(one.known() for one in series):
        return f"Solved groups: {MIXED_GROUPS.absent}"
    explanation = "Prompts of a step whose responses were all right, partly right, or all wrong."
    return stacked_chart("Solved, mixed and unsolved prompts", explanation, series, run.phases, PROMPTS)


def step_parts(records: Sequence[Record]) -> list[str]:
    """Keys of the parts that a step's time is recorded for, in their order."""
    keys = {key for record in records for key in record if key.startswith("seconds/")} - {"seconds/step"}
    order = [f"seconds/{name}" for name in PARTS_OF_A_STEP]
    return [key for key in order if key in keys] + sorted(keys - set(order))


def other_charts(run: RunRecords) -> list[Chart]:
    """One chart for every recorded metric that is not in `run_charts`, titled by its name in the records."""
    shown = {key for curves in (REWARD, *HEALTH, *COST, STEP_SECONDS) for _, key, _ in curves.keys}
    shown |= {"step", "weight_version", *(key for _, key, _ in GROUP_KEYS), *step_parts(run.steps)}
    figures = sorted({key for record in run.steps for key, value in record.items() if is_number(value)} - shown)
    charts = []
    for key in figures:
        breaks = phase_changes(run.phases) if key.rsplit("/")[-1] in OF_THE_UPDATE else ()
        series = Series("value", run.step_numbers, run.column(key), 1, breaks=breaks)
        charts.append(line_chart(key, "", [series], run.phases))
    return charts


def _seconds_chart(run: RunRecords) -> Chart | str:
    parts, total = step_parts(run.steps), run.column(WHOLE)
    if not any(value is not None for value in total):
        return f"Seconds per part: {STEP_SECONDS.absent}"
    columns = [run.column(key) for key in parts]
    rest = tuple(
        None if whole is None else max(0.0, whole - sum(value or 0.0 for value in values))
        for whole, *values in zip(total, *columns, strict=True)
    )
    series = [
        Series(_name(key), run.step_numbers, column, min(index + 1, SERIES_COLOURS - 1))
        for index, (key, column) in enumerate(zip(parts, columns, strict=True))
    ]
    series.append(Series("other", run.step_numbers, rest, SERIES_COLOURS))
    explanation = "Wall time of a step by what it was spent on."
    return stacked_chart("Seconds per part", explanation, series, run.phases, STEP_SECONDS.axis)


def time_table(run: RunRecords) -> Table | None:
    """A row per part, the rest as `other`; None when no step has its time."""
    steps = [record for record in run.steps if record.get(WHOLE) is not None]
    if not steps:
        return None
    phases = list(dict.fromkeys(record["phase"] for record in steps))
    by_phase = [[record for record in steps if record["phase"] == phase] for phase in phases]
    parts = step_parts(steps)
    header = ("seconds per step", *phases, *(("all steps",) if len(phases) > 1 else ()), "share")
    columns = [*by_phase, *([steps] if len(phases) > 1 else [])]
    whole = sum(record[WHOLE] for record in steps)
    rows = []
    for part in (*parts, "other", WHOLE):
        means = (f"{fmean(_seconds(record, part, parts) for record in column):.2f}" for column in columns)
        share = sum(_seconds(record, part, parts) for record in steps) / whole
        rows.append((_name(part), *means, f"{100 * share:.0f} %"))
    return Table(header, tuple(rows))


def _seconds(record: Record, part: str, parts: Sequence[str]) -> float:
    """A part that a step did not have took none of its time."""
    if part == "other":
        return max(0.0, record[WHOLE] - sum(record.get(each) or 0.0 for each in parts))
    return record.get(part) or 0.0


def _name(part: str) -> str:
    return "the whole step" if part == WHOLE else part.removeprefix("seconds/").replace("_", " ")


def write_learning_curve(run_folder: Path, path: Path) -> Path:
    """Write an SVG file, which follows the reader's light or dark colour scheme, and return its path.

    Raises:
        UserError: the folder is not a run folder, or neither an evaluation nor a reward was recorded.
    """
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
    known = [reward for reward in run.column("reward/mean") if reward is not None]
    is_share = bool(known) and min(known) >= 0 and max(known) <= 1
    rewards = []
    if known and (is_share or not accuracies):
        rewards = [Series("reward of the samples", run.step_numbers, run.column("reward/mean"), REWARD_COLOUR)]
    if not accuracies and not rewards:
        raise UserError(f"{run.folder} has no evaluation and no reward yet, so no curve can be drawn")
    axis = SHARE if is_share or accuracies else ValueAxis("reward")
    return draw(ChartSource("lines", run.name, "", (*accuracies, *rewards), tuple(run.phases), axis), WIDE)
