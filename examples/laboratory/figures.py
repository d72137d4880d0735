"""The laboratory's charts, drawn from collected results."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean

from examples.laboratory.claims import DSRL, GRPO, NSR_PRERL, NSR_RL, PRERL, PSR_PRERL, W_REINFORCE
from examples.laboratory.results_data import SweepResults, final_accuracy, final_pass_at, pass_at_budgets
from megatron_dsrl.analysis.behaviours import BEHAVIOURS
from megatron_dsrl.charts.chart_source import Series, StepAxis, ValueAxis
from megatron_dsrl.charts.charts import Chart, line_chart
from megatron_dsrl.charts.estimate import Estimate
from megatron_dsrl.charts.figure import write_figure
from megatron_dsrl.observability.records import Record

SMOOTHED_STEPS = 5
"""Number of steps that a point of a curve is the mean of, because one step has only 128 responses."""
PERCENT = ValueAxis("%", at_least=0.0, at_most=100.0)
SHARE = ValueAxis("share of responses", at_least=0.0, at_most=1.0)
GROUPS = {
    "warm-ups": (GRPO, DSRL, NSR_RL),
    "single phases": (GRPO, NSR_PRERL, PSR_PRERL, PRERL, W_REINFORCE),
}
"""Methods of comparison.yaml that are drawn together: more curves than colours cannot be told apart."""
OVER_STEPS = (
    ("Accuracy on sampled training problems", "accuracy", ValueAxis("accuracy", at_least=0.0, at_most=1.0)),
    ("Transitions", "transitions", ValueAxis("per response", at_least=0.0)),
    ("Reflections", "reflections", ValueAxis("per response", at_least=0.0)),
    ("Response length", "response/mean_tokens", ValueAxis("tokens", at_least=0.0)),
    ("Solved problems", "solved", ValueAxis("of 16 per step", at_least=0.0)),
    ("Unsolved problems", "unsolved", ValueAxis("of 16 per step", at_least=0.0)),
)
"""Title, key of the step records, and axis."""


def write_comparison_figures(results: SweepResults, folder: Path) -> list[tuple[str, str]]:
    """Write three figures per group of methods; returns a title and a file name for each."""
    written = []
    for group, methods in GROUPS.items():
        shown = [method for method in methods if method in results.methods]
        if not shown:
            continue
        name = group.replace(" ", "_")
        figures = {
            "over steps": [
                line_chart(title, f"Means over {SMOOTHED_STEPS} steps.", _curves(results, shown, key), vertical=axis)
                for title, key, axis in OVER_STEPS
            ],
            "behaviours": [
                line_chart(behaviour.replace("_", " "), "By rule.", _curves(results, shown, behaviour), vertical=SHARE)
                for behaviour in BEHAVIOURS
            ],
            "pass at k": [pass_at_k_chart(results, shown)],
        }
        for kind, charts in figures.items():
            file = f"{name}_{kind.replace(' ', '_')}.svg"
            write_figure(charts, folder / file)
            written.append((f"{group}, {kind}", file))
    return written


def pass_at_k_chart(results: SweepResults, methods: Sequence[str]) -> Chart:
    """Held-out Pass@K of methods after training, in percent."""
    budgets = tuple(pass_at_budgets(results.results))
    series = [
        _estimates(method, budgets, [list(results.by_seed(method, final_pass_at(k)).values()) for k in budgets], i)
        for i, method in enumerate(methods)
    ]
    samples = StepAxis("K", is_log2=True, label="samples per problem, K")
    return line_chart("Pass@K after training", "Held-out.", series, vertical=PERCENT, horizontal=samples)


def gap_charts(gradients: Record) -> list[Chart]:
    """Log-prob gap between the spaces by position and by entropy, on the base's responses."""
    nats = ValueAxis("nats")
    by_position, by_entropy = gradients["gap_by_position"], gradients["gap_by_entropy"]
    positions = tuple(one["first_position"] for one in by_position)
    tenths = tuple(range(1, len(by_entropy) + 1))
    position_axis = StepAxis("from position", is_log2=True, label="position in the response")
    return [
        line_chart(
            "Log-prob gap by position",
            "log P(y_t|x) - log P(y_t).",
            [Series("mean", positions, tuple(one["mean_gap"] for one in by_position), 1)],
            vertical=nats,
            horizontal=position_axis,
        ),
        line_chart(
            "Log-prob gap by entropy",
            "log P(y_t|x) - log P(y_t).",
            [Series("mean", tenths, tuple(one["mean_gap"] for one in by_entropy), 1)],
            vertical=nats,
            horizontal=StepAxis("tenth", label="tenth of the tokens, by entropy"),
        ),
    ]


def over_warmup_chart(title: str, cells: Mapping[str, Mapping[int, Sequence[float]]]) -> Chart:
    """Final accuracy over the warm-up's length, a curve per cell.

    Args:
        cells: by name, accuracies in percent of the runs, by warm-up length.
    """
    series = [
        _estimates(name, tuple(sorted(lengths)), [lengths[length] for length in sorted(lengths)], i)
        for i, (name, lengths) in enumerate(cells.items())
    ]
    lengths = StepAxis("warm-up", label="warm-up steps")
    return line_chart(title, "Held-out.", series, vertical=PERCENT, horizontal=lengths)


def accuracies_by_warmup(results: SweepResults, length_of: Callable[[str], tuple[str, int]]) -> dict[str, dict]:
    """Final accuracies by cell and warm-up length.

    Args:
        length_of: cell and warm-up length of a method's name.
    """
    cells: dict[str, dict[int, list[float]]] = {}
    for method in results.methods:
        cell, length = length_of(method)
        cells.setdefault(cell, {})[length] = list(results.by_seed(method, final_accuracy).values())
    return cells


def _curves(results: SweepResults, methods: Sequence[str], key: str) -> list[Series]:
    return [Series(method, *_smoothed(results.curve(method, key)), i + 1) for i, method in enumerate(methods)]


def _smoothed(curve: Sequence[tuple[int, list[float]]]) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Means over whole windows of steps, at their last steps."""
    windows = [curve[i : i + SMOOTHED_STEPS] for i in range(0, len(curve), SMOOTHED_STEPS)]
    means = tuple(fmean(value for _, values in window for value in values) for window in windows)
    return tuple(window[-1][0] for window in windows), means


def _estimates(name: str, places: tuple[int, ...], values: Sequence[Sequence[float]], position: int) -> Series:
    estimates = [Estimate(tuple(one)) for one in values]
    half_widths = tuple(estimate.half_width for estimate in estimates)
    return Series(name, places, tuple(estimate.mean for estimate in estimates), position + 1, half_widths)
