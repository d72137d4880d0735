"""The charts of a training that the report shows, for one run and for several: which figures of the step records, and
what they mean."""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_dsrl.charts.chart_source import SERIES_COLOURS, Series, ValueAxis, phase_changes
from megatron_dsrl.charts.charts import Chart, line_chart, stacked_chart
from megatron_dsrl.common.numbers import is_number
from megatron_dsrl.observability.records import Record
from megatron_dsrl.observability.run_records import PhaseSpan, RunRecords

PARTS_OF_A_STEP = ("generate", "old_log_probs", "reference", "values", "critic", "train", "push_weights", "evaluate")
"""In their order, as the names of seconds in step records."""
FRACTION = ValueAxis("fraction", at_least=0.0, at_most=1.0)
NAT = ValueAxis("nats per token")
PERCENT = ValueAxis("accuracy, %", at_least=0.0, at_most=100.0)
WHOLE_STEP = "seconds/step"


@dataclass(frozen=True)
class Curves:
    """A line chart of step-record keys."""

    title: str
    explanation: str
    keys: tuple[tuple[str, str, int], ...]
    """Series name, step-record key and colour of every curve; the first one is the one that comparisons show."""
    axis: ValueAxis
    is_of_the_update: bool = False
    """The value depends on the phase's space and coefficient, so it is not comparable between phases."""
    absent: str = "nothing was recorded."
    """Shown instead of the chart when no step has a value."""


REWARD = Curves(
    "Reward",
    "Mean verifier score of all sampled responses.",
    (("mean reward", "reward/mean", 1),),
    ValueAxis("mean reward"),
)
HEALTH = (
    Curves(
        "Response length",
        "Tokens per response; if the longest equals the length limit, it was truncated.",
        (("mean tokens", "response/mean_tokens", 1), ("longest", "response/max_tokens", 5)),
        ValueAxis("tokens"),
    ),
    Curves(
        "Truncated responses",
        "Fraction of responses that were cut at the length limit.",
        (("fraction", "response/truncated_fraction", 2),),
        FRACTION,
    ),
    Curves(
        "Entropy of P(y|x)",
        "Of the policy given the prompt, P(y|x), per token (nats). Sampled: estimated from the log-probs of all "
        "sampled tokens. Trained: exact, over the tokens trained on in the post-train space.",
        (("sampled", "response/conditional_entropy", 4), ("trained", "policy/entropy", 5)),
        NAT,
    ),
    Curves(
        "Entropy of P(y)",
        "Without the prompt, as the pre-train space updates it: per trained token (nats).",
        (("entropy", "pre_train/entropy", 4),),
        NAT,
        absent="no step was in the pre-train space.",
    ),
    Curves(
        "Log-prob gap to the engine",
        "|trainer − engine| per token (nats). Both score the same weights, so it should stay near zero.",
        (("mean gap", "mismatch/mean_log_prob_gap", 2), ("largest", "mismatch/max_log_prob_gap", 5)),
        ValueAxis("nats per token", is_log=True),
        absent="no step was in the post-train space, where trainer and engine score the same sequence.",
    ),
    Curves(
        "Tokens with a ratio outside 0.5 to 2",
        "Fraction of tokens whose probability by the trainer is less than half or more than twice the engine's.",
        (("fraction", "mismatch/ratio_tail_fraction", 5),),
        FRACTION,
        absent="no step was in the post-train space, where trainer and engine score the same sequence.",
    ),
    Curves(
        "Log-prob gap to the prompt",
        "|log P(y) − log P(y|x)| per token (nats): how much the prompt matters to the response.",
        (("mean gap", "pre_train/mean_log_prob_gap", 4),),
        NAT,
        absent="no step was in the pre-train space.",
    ),
    Curves(
        "Loss",
        "Of the update, coefficient included: not comparable between phases, so each phase has its own curve.",
        (("loss", "policy/loss", 1),),
        ValueAxis("loss"),
        is_of_the_update=True,
    ),
    Curves(
        "Gradient norm",
        "Global norm of the update before clipping, coefficient included: each phase has its own curve.",
        (("gradient norm", "policy/grad_norm", 3),),
        ValueAxis("norm"),
        is_of_the_update=True,
    ),
    Curves(
        "Trained samples",
        "Samples that the phase's filter kept for the update.",
        (("kept samples", "policy/kept_samples", 3),),
        ValueAxis("samples"),
    ),
)
COST = (
    Curves(
        "Tokens per second",
        "Response tokens generated per second of generation.",
        (("tokens per second", "throughput/tokens_per_second", 3),),
        ValueAxis("tokens per second"),
    ),
)
PROMPTS = ValueAxis("prompts")
GROUP_KEYS = (
    ("solved", "reward/solved_groups", 3),
    ("mixed", "reward/mixed_groups", 1),
    ("unsolved", "reward/unsolved_groups", 2),
)
MIXED_GROUPS = Curves(
    "Mixed groups",
    "Prompts with right and wrong responses in the same step: the ones that group advantages learn from.",
    (("mixed", "reward/mixed_groups", 1),),
    PROMPTS,
)
STEP_SECONDS = Curves(
    "Seconds per step",
    "Wall time.",
    (("seconds", "seconds/step", 1),),
    ValueAxis("seconds"),
)
SPACES = {
    "post_train": ("log P(y|x)", 1),
    "pre_train": ("log P(y)", 2),
    "post_train+pre_train": ("log P(y|x) and log P(y)", 4),
}
"""Label and curve colour of a phase, by the `space` of its step records."""
OF_THE_UPDATE = ("loss", "total_loss", "grad_norm")
"""Last parts of keys whose values are comparable within a phase only."""


def run_charts(run: RunRecords) -> list[tuple[str, list[Chart | str]]]:
    """Headed sections of charts; a chart without data is replaced by a sentence. Needs at least one step."""
    learning = [_accuracy_of_run(run), _run_chart(run, REWARD), _groups_chart(run)]
    if run.held_out_losses or run.known("data/epoch"):
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
    """A curve per space that the run trained in, broken between phases."""
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
    keys = {key for record in records for key in record if key.startswith("seconds/")} - {WHOLE_STEP}
    order = [f"seconds/{name}" for name in PARTS_OF_A_STEP]
    return [key for key in order if key in keys] + sorted(keys - set(order))


def part_name(key: str) -> str:
    return key.removeprefix("seconds/").replace("_", " ")


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
    if not run.known(WHOLE_STEP):
        return f"Seconds per part: {STEP_SECONDS.absent}"
    parts, total = step_parts(run.steps), run.column(WHOLE_STEP)
    columns = [run.column(key) for key in parts]
    rest = tuple(
        None if whole is None else max(0.0, whole - sum(value or 0.0 for value in values))
        for whole, *values in zip(total, *columns, strict=True)
    )
    series = [
        Series(part_name(key), run.step_numbers, column, min(index + 1, SERIES_COLOURS - 1))
        for index, (key, column) in enumerate(zip(parts, columns, strict=True))
    ]
    series.append(Series("other", run.step_numbers, rest, SERIES_COLOURS))
    explanation = "Wall time of a step by what it was spent on."
    return stacked_chart("Seconds per part", explanation, series, run.phases, STEP_SECONDS.axis)
