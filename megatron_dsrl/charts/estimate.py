"""A figure over several runs: its mean and confidence interval."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from scipy import stats

CONFIDENCE = 0.95


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
