"""Means over several runs with their confidence intervals, and Pass@K charts of them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from scipy import stats

from megatron_dsrl.charts.chart_source import Series, StepAxis, ValueAxis
from megatron_dsrl.charts.charts import Chart, line_chart

CONFIDENCE = 0.95
BUDGET = StepAxis("K =", is_log2=True, label="samples per problem, K")
PASS_AT_K = ValueAxis("Pass@K", at_least=0.0, at_most=1.0, include=(0.0, 1.0))


@dataclass(frozen=True)
class Estimate:
    """A mean over runs."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean over the runs."""
        return fmean(self.values)

    @property
    def half_width(self) -> float | None:
        """Half of the 95 % interval; None for a single run, which has no spread."""
        count = len(self.values)
        if count < 2:
            return None
        quantile = float(stats.t.ppf((1 + CONFIDENCE) / 2, count - 1))
        return quantile * stdev(self.values) / math.sqrt(count)


def in_percent(values: Sequence[float]) -> str:
    """The mean in percent with half of its interval, such as `71.3 ± 1.2`; empty without values."""
    if not values:
        return ""
    estimate = Estimate(tuple(values))
    spread = "" if estimate.half_width is None else f" ± {100 * estimate.half_width:.1f}"
    return f"{100 * estimate.mean:.1f}{spread}"


def pass_at_k_chart(title: str, curves: Mapping[str, Mapping[int, Estimate]]) -> Chart:
    """One curve per name, at most `SERIES_COLOURS`: pass@K by K ascending; error bars for means over several runs."""
    series = [estimated_series(name, by_k, colour) for colour, (name, by_k) in enumerate(curves.items(), start=1)]
    explanation = "Unbiased estimate, mean over problems."
    if any(one.errors for one in series):
        explanation += " For several runs: their mean ± half of its 95 % interval."
    return line_chart(title, explanation, series, (), PASS_AT_K, BUDGET)


def over_runs(runs: Sequence[Mapping[int, float]]) -> dict[int, Estimate]:
    """Values over the runs, at every step (or K) that all of them have."""
    steps = sorted(set.intersection(*map(set, runs))) if runs else []
    return {step: Estimate(tuple(run[step] for run in runs)) for step in steps}


def estimated_series(name: str, by_step: Mapping[int, Estimate], colour: int) -> Series:
    """A curve of means; with error bars where several runs have a spread."""
    errors = tuple(estimate.half_width for estimate in by_step.values())
    means = tuple(estimate.mean for estimate in by_step.values())
    return Series(name, tuple(by_step), means, colour, errors if any(error is not None for error in errors) else None)
