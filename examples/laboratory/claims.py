"""The paper's claims as protocol.md registers them: a figure, the range it should lie in, and a verdict."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from examples.laboratory.paired import Interval, PairedDifference, paired, verdict
from examples.laboratory.results_data import (
    BySeed,
    SweepResults,
    base_accuracy,
    final_accuracy,
    final_pass_at,
    growth,
    steps_mean,
)

GRPO, DSRL, NSR_RL = "GRPO", "DSRL", "NSR-RL warm-up, then GRPO"
NSR_PRERL, PSR_PRERL, PRERL = "NSR-PreRL only", "PSR-PreRL only", "PreRL"
W_REINFORCE = "W-REINFORCE"
EARLY, AFTER_20, LAST = (1, 3), (18, 20), (38, 40)
"""First and last step of the windows that the protocol averages over."""


@dataclass(frozen=True)
class Claim:
    """A statement of the paper."""

    number: int
    """Its number in protocol.md."""
    paper: str
    figure: str
    seeds: Callable[[SweepResults], BySeed]
    """The figure by seed; empty if the runs are missing."""
    low: float = -math.inf
    high: float = math.inf


@dataclass(frozen=True)
class Finding:
    """The outcome of a claim."""

    number: int
    paper: str
    figure: str
    found: str
    """Mean and intervals in words; `-` without runs."""
    runs: int
    verdict: str


def difference(one: str, other: str, figure: Callable) -> Callable[[SweepResults], BySeed]:
    """`one` minus `other` by seed."""

    def by_seed(results: SweepResults) -> BySeed:
        ours, theirs = results.by_seed(one, figure), results.by_seed(other, figure)
        return {seed: ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())}

    return by_seed


def gain(method: str) -> Callable[[SweepResults], BySeed]:
    """Final minus base accuracy by seed."""
    return lambda results: results.by_seed(method, lambda run: final_accuracy(run) - base_accuracy(run))


def of_method(method: str, figure: Callable) -> Callable[[SweepResults], BySeed]:
    """A figure of one method by seed."""
    return lambda results: results.by_seed(method, figure)


CLAIMS = (
    Claim(
        1,
        "DSRL is better than GRPO (+1.8 points)",
        "accuracy, DSRL - GRPO",
        difference(DSRL, GRPO, final_accuracy),
        0,
    ),
    Claim(
        2,
        "DSRL is better than an NSR-RL warm-up (+3.2)",
        "accuracy, DSRL - NSR-RL warm-up",
        difference(DSRL, NSR_RL, final_accuracy),
        0,
    ),
    Claim(3, "DSRL's Pass@K is above GRPO's", "Pass@64, DSRL - GRPO", difference(DSRL, GRPO, final_pass_at(64)), 0),
    Claim(
        4,
        "NSR-PreRL multiplies transitions (x14.89 after 20 steps)",
        "growth of transitions, NSR-PreRL",
        of_method(NSR_PRERL, growth("transitions", EARLY, AFTER_20)),
        2,
    ),
    Claim(
        5,
        "NSR-PreRL multiplies reflections (x6.54 after 20 steps)",
        "growth of reflections, NSR-PreRL",
        of_method(NSR_PRERL, growth("reflections", EARLY, AFTER_20)),
        2,
    ),
    Claim(
        6,
        "NSR-PreRL learns faster than GRPO at first",
        "training accuracy of steps 18-20, NSR-PreRL - GRPO, points",
        difference(NSR_PRERL, GRPO, lambda run: 100 * steps_mean("accuracy", *AFTER_20)(run)),
        0,
    ),
    Claim(
        7,
        "NSR-PreRL to the end over-explores",
        "accuracy, NSR-PreRL - GRPO",
        difference(NSR_PRERL, GRPO, final_accuracy),
        high=0,
    ),
    Claim(8, "PSR-PreRL does not learn", "accuracy, PSR-PreRL - base", gain(PSR_PRERL), high=3),
    Claim(9, "PreRL with both signs collapses in the end", "accuracy, PreRL - base", gain(PRERL), high=0),
    Claim(
        10,
        "DSRL's responses are longer than GRPO's",
        "tokens of steps 38-40, DSRL - GRPO",
        difference(DSRL, GRPO, steps_mean("response/mean_tokens", *LAST)),
        0,
    ),
)
"""Claims about the runs of comparison.yaml, with the numbers of protocol.md."""

WARMUP_CLAIM = Claim(
    13,
    "a warm-up of 10 to 25 steps is best",
    "accuracy, warm-up 10 - 0 of 60 steps",
    difference("10", "0", final_accuracy),
    0,
)
"""The claim about the runs of warmup_lengths.yaml."""


def judge(claim: Claim, results: SweepResults) -> Finding:
    """Compare a claim with the runs."""
    values = {seed: value for seed, value in claim.seeds(results).items() if math.isfinite(value)}
    if not values:
        return Finding(claim.number, claim.paper, claim.figure, "-", 0, "cannot tell")
    found = PairedDifference(tuple(values.values()))
    return Finding(
        claim.number,
        claim.paper,
        claim.figure,
        describe(found),
        len(values),
        verdict(found.student, claim.low, claim.high),
    )


def judge_gradients(gradients: Mapping | None) -> list[Finding]:
    """Claims 11 and 12, from what `base_properties` kept of the gradient analysis; without it, cannot tell."""
    cosine, negative = (None, None) if gradients is None else (gradients["cosine"], gradients["negative"])
    return [
        _of_responses(11, "gradients of both spaces agree (mean cosine 0.44)", "mean cosine", cosine, 0.34, 0.54),
        _of_responses(12, "the inner product is never negative", "share below zero", negative, -1.0, 0.01),
    ]


def describe(found: PairedDifference) -> str:
    """Mean, bootstrap and Student interval in words."""
    return f"{found.mean:+.2f}; bootstrap {_interval(found.bootstrap)}; t {_interval(found.student)}"


def final_difference(results: SweepResults, method: str, baseline: str) -> PairedDifference:
    """Final accuracy of a method minus the baseline's, by seed, in points.

    Raises:
        ValueError: they have no seed in common.
    """
    return paired(results.by_seed(method, final_accuracy), results.by_seed(baseline, final_accuracy))


def _of_responses(number: int, paper: str, figure: str, found: Mapping | None, low: float, high: float) -> Finding:
    if found is None:
        return Finding(number, paper, figure, "-", 0, "cannot tell")
    interval: Interval = (found["low"], found["high"])
    words = f"{found['mean']:.3f}; bootstrap {_interval(interval)}"
    return Finding(number, paper, figure, words, 1, verdict(interval, low, high))


def _interval(interval: Interval | None) -> str:
    return "none" if interval is None else f"{interval[0]:+.2f} to {interval[1]:+.2f}"
