"""Avg@k, Pass@k, Maj@k and their uncertainty against hand-worked values and brute force over all draws."""

from fractions import Fraction
from itertools import combinations

import numpy as np
import pytest

from megatron_dsrl.evaluation.metrics import (
    average_at_k,
    bootstrap_interval,
    majority_right,
    mean_pass_at_k,
    pass_at_k,
    standard_error,
)


def test_hand_worked_average_and_standard_error() -> None:
    rewards = [[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0], [1, 0, 0, 0]]  # means 0.5, 1, 0, 0.25
    assert average_at_k(rewards) == pytest.approx(0.4375, abs=1e-15)
    # squared deviations 0.00390625 + 0.31640625 + 0.19140625 + 0.03515625 = 0.546875; / 3 / 4 -> square root
    assert standard_error(rewards) == pytest.approx(0.21347814, abs=1e-8)


def test_single_problem_has_no_standard_error() -> None:
    assert standard_error([[1, 0, 1]]) is None


@pytest.mark.parametrize("n", range(1, 8))
def test_pass_at_k_equals_the_share_of_all_draws_with_a_right_sample(n) -> None:
    for correct in range(n + 1):
        samples = [True] * correct + [False] * (n - correct)
        for k in range(1, n + 1):
            draws = list(combinations(samples, k))
            share = Fraction(sum(map(any, draws)), len(draws))
            assert pass_at_k(n, correct, k) == pytest.approx(float(share), abs=1e-14)


def test_pass_at_k_stays_exact_where_binomials_overflow() -> None:
    # One right among n: it is in a draw of k with probability k / n.
    assert pass_at_k(20_000, 1, 5_000) == pytest.approx(0.25, rel=1e-9)


@pytest.mark.parametrize(("n", "c", "k"), [(4, 5, 1), (4, -1, 1), (4, 2, 5), (4, 2, 0)])
def test_pass_at_k_outside_its_domain(n, c, k) -> None:
    with pytest.raises(ValueError, match="not defined"):
        pass_at_k(n, c, k)


def test_mean_over_problems() -> None:
    assert mean_pass_at_k([[True, False], [False, False]], 1) == 0.25
    assert mean_pass_at_k([[True, False], [False, False]], 2) == 0.5


@pytest.mark.parametrize(
    ("answers", "right", "value"),
    [
        (["6", "6", "5"], [True, True, False], 1.0),
        (["6", "5", "5"], [True, False, False], 0.0),
        (["6", "5"], [True, False], 0.5),  # a coin decides
        (["6", "5", "4"], [True, False, False], 1 / 3),
        ([None, None, "6"], [False, False, True], 1.0),  # a missing answer does not vote
        ([None, None], [False, False], 0.0),
        (["1/2", "0.5", "3", "3", "3"], [True, True, False, False, False], 0.0),
        (["1/2", "0.5", "3", "3"], [True, True, False, False], 0.0),  # two spellings are two answers, right or not
    ],
)
def test_majority(answers, right, value) -> None:
    assert majority_right(answers, right) == pytest.approx(value)


def test_bootstrap_interval_of_a_proportion_is_the_normal_one_for_many_problems() -> None:
    values = [1.0] * 120 + [0.0] * 280
    low, high = bootstrap_interval(values)
    half = 1.96 * (0.3 * 0.7 / 400) ** 0.5
    assert low == pytest.approx(0.3 - half, abs=0.006) and high == pytest.approx(0.3 + half, abs=0.006)
    assert bootstrap_interval(values) == (low, high)  # the same every time


def test_bootstrap_interval_covers_the_mean_as_often_as_it_says() -> None:
    generator = np.random.default_rng(1)
    intervals = [bootstrap_interval(generator.binomial(8, 0.4, 60) / 8, resamples=500) for _ in range(300)]
    covered = sum(low <= 0.4 <= high for low, high in intervals) / 300
    assert 0.90 <= covered <= 0.985


def test_bootstrap_needs_two_problems() -> None:
    assert bootstrap_interval([1.0]) is None
    assert bootstrap_interval([1.0, 1.0]) == (1.0, 1.0)
