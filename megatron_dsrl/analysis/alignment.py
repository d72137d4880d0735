"""Gradient alignment of log P(y) and log P(y|x) over many responses: records, bins over tokens, summary and charts.

The log-prob gap of a token is log P(y_t|x, y_<t) - log P(y_t|y_<t): how much the prompt helps to predict it. The
entropy that tokens are binned by is that of the policy given the prompt.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from megatron_dsrl.analysis.gradients import GradientComparison
from megatron_dsrl.charts.chart_source import Series, StepAxis, ValueAxis
from megatron_dsrl.charts.charts import Chart, line_chart
from megatron_dsrl.observability.records import Record

ENTROPY_BINS = 10
_DECIMALS = 6


@dataclass(frozen=True)
class ScoredResponse:
    """A response and the comparison of its gradients."""

    step: int
    problem: int
    number: int
    """Number of the sample within its group."""
    reward: float
    comparison: GradientComparison

    @property
    def gaps(self) -> list[float]:
        """Log-prob gap of every token that both spaces score: all, or all but the first without a BOS token."""
        without = self.comparison.without_prompt.log_probs
        scored_in_both = self.comparison.with_prompt.log_probs[-len(without) :] if len(without) else without
        return (scored_in_both - without).tolist()

    @property
    def entropies(self) -> list[float]:
        """Entropy of the same tokens given the prompt. Unit: nats."""
        gaps = len(self.comparison.without_prompt.log_probs)
        return self.comparison.with_prompt.entropy[-gaps:].tolist() if gaps else []

    def as_record(self) -> Record:
        """Plain values for JSON; values per token are rounded."""
        comparison, gaps = self.comparison, self.gaps
        return {
            "step": self.step,
            "problem": self.problem,
            "sample": self.number,
            "reward": self.reward,
            "tokens": len(comparison.with_prompt.log_probs),
            "log_prob": comparison.without_prompt.log_probs.sum().item(),
            "log_prob_given_prompt": comparison.with_prompt.log_probs.sum().item(),
            "mean_gap": fmean(gaps) if gaps else None,
            "mean_absolute_gap": fmean(map(abs, gaps)) if gaps else None,
            "inner_product": comparison.inner_product,
            "cosine": comparison.cosine,
            "grad_norm": comparison.norm_without_prompt,
            "grad_norm_given_prompt": comparison.norm_with_prompt,
            "gaps": [round(gap, _DECIMALS) for gap in gaps],
            "entropies": [round(entropy, _DECIMALS) for entropy in self.entropies],
        }


def summary(records: Sequence[Record]) -> Record:
    """Statistics over all responses, from their records. The paper reports the mean cosine, the share of negative inner
    products and the mean gap.

    `mean_gap` is the mean over responses of each response's mean over tokens. `gap_by_position` and `gap_by_entropy`
    are bins of tokens.
    """
    cosines = [record["cosine"] for record in records if record["cosine"] is not None]
    gaps = [record for record in records if record["mean_gap"] is not None]
    return {
        "responses": len(records),
        "cosine_mean": fmean(cosines) if cosines else None,
        "cosine_lowest": min(cosines, default=None),
        "cosine_highest": max(cosines, default=None),
        "negative_inner_products": fmean(record["inner_product"] < 0 for record in records),
        "mean_gap": fmean(record["mean_gap"] for record in gaps) if gaps else None,
        "mean_absolute_gap": fmean(record["mean_absolute_gap"] for record in gaps) if gaps else None,
        "gap_by_position": gap_by_position([record["gaps"] for record in records]),
        "gap_by_entropy": gap_by_entropy(
            [gap for record in records for gap in record["gaps"]],
            [entropy for record in records for entropy in record["entropies"]],
        ),
    }


def gap_by_position(gaps: Sequence[Sequence[float]]) -> list[Record]:
    """Mean gap of the tokens at positions 1, 2-3, 4-7, 8-15, ... of their responses. `gaps` has those of each response,
    from its first scored token on."""
    bins: dict[int, list[float]] = {}
    for response_gaps in gaps:
        for position, gap in enumerate(response_gaps, start=1):
            bins.setdefault(position.bit_length() - 1, []).append(gap)
    return [
        {"first_position": 2**index, "last_position": 2 ** (index + 1) - 1, **_gap_figures(bins[index])}
        for index in sorted(bins)
    ]


def gap_by_entropy(gaps: Sequence[float], entropies: Sequence[float]) -> list[Record]:
    """Mean gap in ten bins of tokens by entropy, lowest first. Bins differ by at most one token; fewer bins for fewer
    than ten tokens."""
    order = np.argsort(np.asarray(entropies), kind="stable")
    bins = [part for part in np.array_split(order, ENTROPY_BINS) if len(part)]
    return [
        {
            "lowest_entropy": entropies[part[0]],
            "highest_entropy": entropies[part[-1]],
            **_gap_figures([gaps[i] for i in part]),
        }
        for part in bins
    ]


def charts(records: Sequence[Record]) -> list[Chart]:
    """Cosines by rank, and the gap by position and by entropy."""
    figures = summary(records)
    cosines = sorted(record["cosine"] for record in records if record["cosine"] is not None)
    drawn = []
    if cosines:
        percentiles = range(0, 101, 5)
        values = tuple(float(value) for value in np.percentile(cosines, list(percentiles)))
        drawn.append(
            line_chart(
                "Cosine of the gradients by percentile of responses",
                "Between grad log P(y) and grad log P(y|x).",
                [Series("cosine", tuple(percentiles), values, 1)],
                vertical=ValueAxis("cosine", at_least=-1.0, at_most=1.0),
                horizontal=StepAxis("percentile", label="percentile of responses"),
            )
        )
    by_position, by_entropy = figures["gap_by_position"], figures["gap_by_entropy"]
    if by_position:
        positions = tuple(one["first_position"] for one in by_position)
        from_position = StepAxis("from position", is_log2=True, label="position in the response")
        drawn.append(_gap_chart("Log-prob gap by the token's position", positions, by_position, from_position))
        tenths = tuple(range(1, len(by_entropy) + 1))
        by_tenth = StepAxis("tenth", label="tenth of the tokens, by entropy")
        drawn.append(_gap_chart("Log-prob gap by the token's entropy", tenths, by_entropy, by_tenth))
    return drawn


def _gap_figures(gaps: Sequence[float]) -> Record:
    return {
        "tokens": len(gaps),
        "mean_gap": fmean(gaps),
        "mean_absolute_gap": fmean(map(abs, gaps)),
    }


def _gap_chart(title: str, places: tuple[int, ...], bins: Sequence[Record], horizontal: StepAxis) -> Chart:
    series = [
        Series("mean", places, tuple(one["mean_gap"] for one in bins), 4),
        Series("mean of |gap|", places, tuple(one["mean_absolute_gap"] for one in bins), 5),
    ]
    explanation = "log P(y_t|x, y_<t) - log P(y_t|y_<t), nats."
    return line_chart(title, explanation, series, vertical=ValueAxis("nats"), horizontal=horizontal)
