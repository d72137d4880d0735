"""Avg@k, pass@k and their standard error: pure functions over problems and samples."""

import math
from collections.abc import Sequence
from statistics import fmean, stdev


def average_at_k(rewards: Sequence[Sequence[float]]) -> float:
    """Avg@k: the mean over problems of the mean reward of a problem's k samples.

    Args:
        rewards: per problem the rewards of its samples; no part may be empty.
    """
    return fmean(fmean(samples) for samples in rewards)


def standard_error(rewards: Sequence[Sequence[float]]) -> float | None:
    """Standard error of Avg@k over problems: std of the problems' means (unbiased) / sqrt(problems).

    The problems are the sampling unit: k samples of one problem are not k independent problems. None for a single
    problem, whose spread is unknown.
    """
    means = [fmean(samples) for samples in rewards]
    return stdev(means) / math.sqrt(len(means)) if len(means) > 1 else None


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Unbiased estimate of the probability that at least one of k samples is right (arXiv 2107.03374).

    1 - C(n - c, k) / C(n, k), as a product of k factors below 1, which neither overflows nor cancels.

    Args:
        num_samples: n, samples drawn for the problem.
        num_correct: c, how many of them are right.
        k: samples that a user would draw, at most n.

    Raises:
        ValueError: unless 0 <= c <= n and 1 <= k <= n.
    """
    if not 0 <= num_correct <= num_samples or not 1 <= k <= num_samples:
        raise ValueError(f"pass@{k} of {num_correct} right among {num_samples} samples is not defined")
    wrong = num_samples - num_correct
    if wrong < k:
        return 1.0
    return 1.0 - math.prod((wrong - i) / (num_samples - i) for i in range(k))


def mean_pass_at_k(correct: Sequence[Sequence[bool]], k: int) -> float:
    """Mean of `pass_at_k` over problems, from each problem's samples being right or wrong."""
    return fmean(pass_at_k(len(samples), sum(samples), k) for samples in correct)
