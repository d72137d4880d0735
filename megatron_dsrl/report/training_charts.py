"""Which charts of a training the report shows, for one run and for several."""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_dsrl.observability.chart_axes import VALUES, ValueAxis
from megatron_dsrl.observability.chart_source import SERIES_COLOURS, PhaseSpan, Series
from megatron_dsrl.observability.charts import Chart, line_chart, stacked_chart
from megatron_dsrl.observability.records import Record
from megatron_dsrl.observability.run_records import RunRecords

PARTS_OF_A_STEP = ("generate", "old_log_probs", "reference", "values", "critic", "train", "push_weights", "evaluate")
"""In their order, as the names of seconds in step records."""


@dataclass(frozen=True)
class Curves:
    """A line chart of step-record keys."""

    title: str
    explanation: str
    keys: tuple[tuple[str, str, int], ...]
    """Series name, step-record key and colour of every curve; the first one is the one that comparisons show."""
    absent: str
    """Said instead of the chart when no step has a value."""
    axis: ValueAxis = VALUES


REWARD = Curves(
    "Reward",
    "Mean verifier score of all sampled responses.",
    (("mean reward", "reward/mean", 1),),
    "No rewards were recorded.",
)
HEALTH = (
    Curves(
        "Response length",
        "Tokens per response; a longest response at the length limit was truncated.",
        (("mean tokens", "response/mean_tokens", 1), ("longest", "response/max_tokens", 5)),
        "No response lengths were recorded.",
    ),
    Curves(
        "Truncated responses",
        "Fraction of responses that were cut at the length limit.",
        (("fraction", "response/truncated_fraction", 2),),
        "No truncation was recorded.",
    ),
    Curves(
        "Entropy",
        "Of the policy given the prompt, P(y|x), per token (nat). Sampled: estimated from the log-probs of all sampled "
        "tokens. Trained: exact, over the tokens trained on in the post-train space.",
        (("sampled", "response/conditional_entropy", 4), ("trained", "policy/entropy", 5)),
        "No entropy was recorded.",
    ),
    Curves(
        "Entropy without the prompt",
        "Of P(y), which the pre-train space updates, per trained token (nat).",
        (("entropy", "pre_train/entropy", 4),),
        "No step was in the pre-train space.",
    ),
    Curves(
        "Log-prob gap to the engine",
        "|trainer − engine| per token (nat). Both score the same weights, so it should stay near zero.",
        (("mean gap", "mismatch/mean_log_prob_gap", 2), ("largest", "mismatch/max_log_prob_gap", 5)),
        "No step was in the post-train space, where trainer and engine score the same sequence.",
    ),
    Curves(
        "Tokens on which engine and trainer disagree",
        "Fraction of tokens whose trainer / engine probability lies outside 0.5 to 2.",
        (("fraction", "mismatch/ratio_tail_fraction", 5),),
        "No step was in the post-train space, where trainer and engine score the same sequence.",
    ),
    Curves(
        "Log-prob gap to the prompt",
        "|log P(y) − log P(y|x)| per token (nat): how much the prompt matters to the response.",
        (("mean gap", "pre_train/mean_log_prob_gap", 4),),
        "No step was in the pre-train space.",
    ),
    Curves("Loss", "Policy loss of the step.", (("loss", "policy/loss", 1),), "No loss was recorded."),
    Curves(
        "Gradient norm",
        "Global norm before clipping.",
        (("gradient norm", "policy/grad_norm", 3),),
        "No gradient norm was recorded.",
    ),
    Curves(
        "Trained samples",
        "Samples that the phase's filter kept for the update.",
        (("kept samples", "policy/kept_samples", 3),),
        "No sample counts were recorded.",
    ),
)
COST = (
    Curves(
        "Tokens per second",
        "Response tokens generated per second of generation.",
        (("tokens per second", "throughput/tokens_per_second", 3),),
        "No throughput was recorded.",
    ),
)
GROUP_KEYS = (
    ("solved", "reward/solved_groups", 3),
    ("mixed", "reward/mixed_groups", 1),
    ("unsolved", "reward/unsolved_groups", 2),
)
MIXED_GROUPS = Curves(
    "Mixed groups",
    "Prompts with right and wrong responses in the same step: the ones that group advantages learn from.",
    (("mixed", "reward/mixed_groups", 1),),
    "No groups were recorded.",
)
ACCURACY = ValueAxis("accuracy, %", at_least=0.0, at_most=100.0)
STEP_SECONDS = Curves(
    "Seconds per step", "Wall time.", (("seconds", "seconds/step", 1),), "No times were recorded."
)


def run_charts(run: RunRecords) -> list[tuple[str, list[Chart | str]]]:
    """Headed sections of charts; a sentence stands for a chart that has no data. Needs at least one step."""
    return [
        ("Learning", [accuracy_chart([run]), _run_chart(run, REWARD), _groups_chart(run)]),
        ("Policy", [_run_chart(run, curves) for curves in HEALTH]),
        ("Time", [_seconds_chart(run), *(_run_chart(run, curves) for curves in COST)]),
    ]


def comparison_charts(runs: Sequence[RunRecords]) -> list[tuple[str, list[Chart | str]]]:
    """The same sections with one curve per run."""
    return [
        ("Learning", [accuracy_chart(runs), _compare(runs, REWARD), _compare(runs, MIXED_GROUPS)]),
        ("Policy", [_compare(runs, curves) for curves in HEALTH]),
        ("Time", [_compare(runs, STEP_SECONDS), *(_compare(runs, curves) for curves in COST)]),
    ]


def accuracy_chart(runs: Sequence[RunRecords]) -> Chart | str:
    """Held-out accuracy with error bars: one curve per set, or per run and set when there are several runs."""
    curves = [
        (name if len(runs) == 1 else f"{run.name}: {name}", records)
        for run in runs
        for name, records in run.evaluations.items()
    ]
    if not curves:
        return "No evaluation was recorded."
    series = [
        Series(
            name,
            tuple(record["step"] for record in records),
            tuple(_percent(record["accuracy"]) for record in records),
            index % SERIES_COLOURS + 1,
            tuple(_percent(record["standard_error"]) for record in records),
        )
        for index, (name, records) in enumerate(curves)
    ]
    explanation = "Percent, on problems that are not trained on; ± one standard error. Step 0 is the base model."
    return line_chart("Held-out accuracy", explanation, series, _phases(runs), ACCURACY)


def _percent(fraction: float | None) -> float | None:
    return None if fraction is None else 100 * fraction


def _run_chart(run: RunRecords, curves: Curves) -> Chart | str:
    return _lines(curves, [_series(run, name, key, colour) for name, key, colour in curves.keys], [run])


def _compare(runs: Sequence[RunRecords], curves: Curves) -> Chart | str:
    """One curve per run, of the first key."""
    key = curves.keys[0][1]
    return _lines(curves, [_series(run, run.name, key, i % SERIES_COLOURS + 1) for i, run in enumerate(runs)], runs)


def _series(run: RunRecords, name: str, key: str, colour: int) -> Series:
    return Series(name, run.step_numbers, run.column(key), colour)


def _lines(curves: Curves, series: Sequence[Series], runs: Sequence[RunRecords]) -> Chart | str:
    if not any(value is not None for one in series for value in one.values):
        return f"{curves.title}: {curves.absent}"
    return line_chart(curves.title, curves.explanation, series, _phases(runs), curves.axis)


def _groups_chart(run: RunRecords) -> Chart | str:
    series = [_series(run, name, key, colour) for name, key, colour in GROUP_KEYS]
    if not any(value is not None for one in series for value in one.values):
        return f"Solved groups: {MIXED_GROUPS.absent}"
    explanation = "Prompts of a step whose responses were all right, partly right, or all wrong."
    return stacked_chart("Solved, mixed and unsolved prompts", explanation, series, _phases([run]))


def step_parts(records: Sequence[Record]) -> list[str]:
    """Keys of the parts that a step's time is recorded for, in their order."""
    keys = {key for record in records for key in record if key.startswith("seconds/")} - {"seconds/step"}
    order = [f"seconds/{name}" for name in PARTS_OF_A_STEP]
    return [key for key in order if key in keys] + sorted(keys - set(order))


def other_charts(run: RunRecords) -> list[Chart]:
    """One chart for every recorded figure that has no place in `run_charts`, by its name in the records."""
    shown = {key for curves in (REWARD, *HEALTH, *COST, STEP_SECONDS) for _, key, _ in curves.keys}
    shown |= {"step", "weight_version", "time", *(key for _, key, _ in GROUP_KEYS), *step_parts(run.steps)}
    figures = sorted({key for record in run.steps for key, value in record.items() if _is_number(value)} - shown)
    return [line_chart(key, "", [_series(run, "value", key, 1)], run.phases) for key in figures]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _seconds_chart(run: RunRecords) -> Chart | str:
    parts = step_parts(run.steps)
    total = run.column("seconds/step")
    if not any(value is not None for value in total):
        return f"Seconds per part: {STEP_SECONDS.absent}"
    columns = [run.column(key) for key in parts]
    rest = tuple(
        None if whole is None else max(0.0, whole - sum(value or 0.0 for value in values))
        for whole, *values in zip(total, *columns, strict=True)
    )
    names = [key.removeprefix("seconds/").replace("_", " ") for key in parts]
    series = [
        Series(name, run.step_numbers, column, min(index + 1, SERIES_COLOURS - 1))
        for index, (name, column) in enumerate(zip(names, columns, strict=True))
    ]
    series.append(Series("other", run.step_numbers, rest, SERIES_COLOURS))
    return stacked_chart("Seconds per part", "Wall time of a step by what it was spent on.", series, _phases([run]))


def _phases(runs: Sequence[RunRecords]) -> list[PhaseSpan]:
    """Phases are shaded for a single run only: those of several runs would overlap."""
    return runs[0].phases if len(runs) == 1 else []
