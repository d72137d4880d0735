"""Avg@k, Pass@k, Maj@k and their uncertainty: pure functions over problems and samples."""

import math
from collections import Counter
from collections.abc import Sequence
from statistics import fmean, stdev

import numpy as np


def average_at_k(rewards: Sequence[Sequence[float]]) -> float:
    """Avg@k: the mean over problems of the mean reward of a problem's k samples.

    Args:
        rewards: the rewards of each problem's samples; neither may be empty.
    """
    return fmean(fmean(samples) for samples in rewards)


def standard_error(rewards: Sequence[Sequence[float]]) -> float | None:
    """Standard error of Avg@k over problems: std of the problems' means (unbiased) / sqrt(problems).

    Problems are the sampling unit: k samples of one problem are not k independent problems. None for a single problem,
    which has no spread.
    """
    means = [fmean(samples) for samples in rewards]
    return stdev(means) / math.sqrt(len(means)) if len(means) > 1 else None


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Unbiased estimate of the probability that at least one of k samples is right (arXiv 2107.03374).

    1 - C(n - c, k) / C(n, k), as a product of k factors below 1, which neither overflows nor cancels.

    Args:
        num_samples: n, samples drawn for the problem.
        num_correct: c, number of right ones.
        k: at most n.

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
    """Mean of `pass_at_k` over problems. `correct`: for each problem, whether each sample is right."""
    return fmean(pass_at_k(len(samples), sum(samples), k) for samples in correct)


def majority_right(answers: Sequence[str | None], right: Sequence[bool]) -> float:
    """Maj@k of one problem: the probability that the most frequent answer of its k samples is right.

    Votes are normalised strings. Right and wrong ones are treated alike: an answer that the verifier accepts in two
    spellings does not get the votes of both. Samples without an answer do not vote. Ties are broken by a fair coin;
    its expectation is returned. A spelling is right if the verifier accepted it.

    Args:
        answers: one per sample, None without an answer.
        right: whether the verifier accepted each sample.
    """
    votes = Counter(answer for answer in answers if answer is not None)
    if not votes:
        return 0.0
    most = max(votes.values())
    accepted = {answer for answer, is_right in zip(answers, right, strict=True) if is_right}
    winners = [answer for answer, count in votes.items() if count == most]
    return fmean(answer in accepted for answer in winners)


def bootstrap_interval(
    values: Sequence[float], confidence: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float] | None:
    """Percentile bootstrap interval of a mean over problems.

    Whole problems, the sampling unit, are drawn with replacement. None for a single problem. If all problems have the
    same value the interval has no width, however few they are.

    Args:
        values: one per problem.
        confidence: covered probability.
        resamples: number of bootstrap draws.
        seed: seed of the draws; the same values give the same interval.
    """
    if len(values) < 2:
        return None
    generator = np.random.default_rng(seed)
    array = np.asarray(values, dtype=np.float64)
    means = np.array([array[generator.integers(0, len(array), len(array))].mean() for _ in range(resamples)])
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)
