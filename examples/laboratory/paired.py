"""Paired comparison of methods, and the power it has: pure functions.

The seed is the pair: it fixes the order of the prompts and the sampling seeds of all methods.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean, stdev

from scipy import stats

from megatron_dsrl.evaluation.metrics import bootstrap_interval

Interval = tuple[float, float]


@dataclass(frozen=True)
class PairedDifference:
    """Differences of two methods over the seeds that both have."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean over the seeds."""
        return fmean(self.values)

    @property
    def bootstrap(self) -> Interval | None:
        """95 % percentile bootstrap interval over seeds; None for fewer than two. Too narrow for few seeds."""
        return bootstrap_interval(self.values) if len(self.values) > 1 else None

    @property
    def student(self) -> Interval | None:
        """95 % interval by Student's t; None for fewer than two seeds. Verdicts use it, because it is the wider one."""
        if len(self.values) < 2:
            return None
        half = stats.t.ppf(0.975, len(self.values) - 1) * stdev(self.values) / math.sqrt(len(self.values))
        return self.mean - half, self.mean + half


def paired(one: Mapping[int, float], other: Mapping[int, float]) -> PairedDifference:
    """`one` minus `other`, both by seed.

    Raises:
        ValueError: the methods have no seed in common.
    """
    seeds = sorted(one.keys() & other.keys())
    if not seeds:
        raise ValueError("the two methods have no seed in common")
    return PairedDifference(tuple(one[seed] - other[seed] for seed in seeds))


def power_of_paired_test(difference: float, deviation: float, pairs: int, level: float = 0.05) -> float:
    """Probability that a two-sided paired t-test finds a true difference.

    Args:
        difference: true mean difference.
        deviation: standard deviation of the pairs' differences, in the same unit.
        pairs: number of pairs, at least 2.
        level: significance level.
    """
    freedom, shift = pairs - 1, difference / deviation * math.sqrt(pairs)
    critical = stats.t.ppf(1 - level / 2, freedom)
    return float(stats.nct.sf(critical, freedom, shift) + stats.nct.cdf(-critical, freedom, shift))


def verdict(interval: Interval | None, low: float = -math.inf, high: float = math.inf) -> str:
    """`agree` if the interval lies inside low..high, `disagree` if it lies outside, else `cannot tell`."""
    if interval is None:
        return "cannot tell"
    if low < interval[0] and interval[1] < high:
        return "agree"
    return "disagree" if interval[1] < low or interval[0] > high else "cannot tell"
