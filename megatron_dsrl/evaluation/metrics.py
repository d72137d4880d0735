"""Avg@k, Pass@k, Maj@k and their uncertainty: pure functions over problems and samples."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from statistics import fmean, median, stdev
from typing import Any

import numpy as np

from megatron_dsrl.evaluation.sample_file import ProblemResult


def average_at_k(rewards: Sequence[Sequence[float]]) -> float:
    """Avg@k: the mean over problems of the mean reward of a problem's k samples. `rewards` has those of each problem's
    samples; neither may be empty."""
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

    1 - C(n - c, k) / C(n, k), as a product of k factors below 1, which neither overflows nor cancels. Raises ValueError
    unless 0 <= c <= n and 1 <= k <= n.

    Args:
        num_samples: n, samples drawn for the problem.
        num_correct: c, number of right ones.
        k: at most n.
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


def bootstrap_interval(values: Sequence[float], resamples: int = 10_000) -> tuple[float, float] | None:
    """95 % percentile bootstrap interval of a mean over problems. The same values give the same interval.

    Whole problems, the sampling unit, are drawn with replacement. None for a single problem. If all problems have the
    same value the interval has no width, however few they are. There is one value per problem.
    """
    if len(values) < 2:
        return None
    generator = np.random.default_rng(0)
    array = np.asarray(values, dtype=np.float64)
    means = np.array([array[generator.integers(0, len(array), len(array))].mean() for _ in range(resamples)])
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


AnswerOf = Callable[[str], str | None]
"""Extracts a response's normalised answer; None without one."""


def summarise(problems: Sequence[ProblemResult]) -> dict[str, Any]:
    """Accuracy and lengths. The accuracy is the mean reward, Avg@k; its standard error is over problems. There is at
    least one problem, and all have the same number of samples."""
    rewards = [[sample.reward for sample in problem.samples] for problem in problems]
    samples = [sample for problem in problems for sample in problem.samples]
    return {
        "accuracy": average_at_k(rewards),
        "standard_error": standard_error(rewards),
        "problems": len(problems),
        "samples_per_prompt": len(problems[0].samples),
        "mean_tokens": fmean(sample.tokens for sample in samples),
        "truncated_fraction": fmean(sample.truncated for sample in samples),
    }


def summarise_benchmark(problems: Sequence[ProblemResult], answer_of: AnswerOf | None) -> dict[str, Any]:
    """The results of `summarise`, plus intervals, Pass@k, Maj@k and verifier failures.

    Args:
        problems: as in `summarise`.
        answer_of: extracts the answers for the majority vote; None if answers cannot be compared (code), and Maj@k is
            then None.
    """
    right = [[sample.right for sample in problem.samples] for problem in problems]
    samples = [sample for problem in problems for sample in problem.samples]
    majority = None
    if answer_of is not None:
        votes = [[answer_of(sample.text) for sample in problem.samples] for problem in problems]
        majority = [majority_right(answers, is_right) for answers, is_right in zip(votes, right, strict=True)]
    means = [fmean(sample.reward for sample in problem.samples) for problem in problems]
    return {
        **summarise(problems),
        "confidence_interval_95": bootstrap_interval(means),
        "pass_at_k": {k: mean_pass_at_k(right, k) for k in powers_of_two(len(problems[0].samples))},
        "majority_at_k": None if majority is None else fmean(majority),
        "majority_confidence_interval_95": None if majority is None else bootstrap_interval(majority),
        "median_tokens": median(sample.tokens for sample in samples),
        "verifier_timeouts": sum(sample.verdict == "timeout" for sample in samples),
        "verifier_fallbacks": sum(sample.verdict == "fallback" for sample in samples),
        "verifier_errors": sum(sample.verdict == "error" for sample in samples),
    }


def powers_of_two(largest: int) -> list[int]:
    """1, 2, 4, ..., ending with `largest` itself."""
    return [*(2**i for i in range(largest.bit_length()) if 2**i < largest), largest]
