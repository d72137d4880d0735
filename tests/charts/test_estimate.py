"""Means over runs and their intervals, against hand-worked numbers."""

import pytest

from megatron_dsrl.charts.estimate import Estimate, in_percent


def test_the_interval_is_students_t_over_runs() -> None:
    # mean 0.60, standard deviation 0.05, t(0.975, 2 degrees of freedom) = 4.30265: 4.30265 * 0.05 / sqrt(3)
    estimate = Estimate((0.55, 0.60, 0.65))
    assert estimate.mean == pytest.approx(0.60)
    assert estimate.half_width == pytest.approx(0.124207, abs=1e-6)
    assert in_percent(estimate.values) == "60.0 ± 12.4"
    assert in_percent([0.5]) == "50.0", "one run has no spread"
    assert in_percent([]) == ""
