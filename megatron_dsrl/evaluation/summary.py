"""Results of an evaluation: those that a training run records for a held-out set, and the full ones of a benchmark."""

from collections.abc import Callable, Sequence
from statistics import fmean, median
from typing import Any

from megatron_dsrl.evaluation.metrics import (
    average_at_k,
    bootstrap_interval,
    majority_right,
    mean_pass_at_k,
    standard_error,
)
from megatron_dsrl.evaluation.problem_result import ProblemResult

AnswerOf = Callable[[str], str | None]
"""Extracts a response's normalised answer; None without one."""


def summarise(problems: Sequence[ProblemResult]) -> dict[str, Any]:
    """Accuracy and lengths. The accuracy is the mean reward, Avg@k; its standard error is over problems.

    Args:
        problems: not empty, with the same number of samples each.
    """
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
