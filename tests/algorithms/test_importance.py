"""Mismatch metrics and importance corrections between engine and trainer: by hand, and what they leave alone."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_dsrl.algorithms.importance import Masked, Truncated, mismatch_metrics
from megatron_dsrl.algorithms.losses import ScoredTokens
from tests.support.experiences import scored_tokens

RATIOS = [1.5, 3.0, 0.4, 1.0]
"""Trainer to engine, for two sequences of two tokens; the products are 4.5 and 0.4."""


def tokens_with(ratios: list[float], lengths: list[int]) -> ScoredTokens:
    engine = torch.zeros(len(ratios))
    trainer = torch.tensor([math.log(ratio) for ratio in ratios])
    return scored_tokens(trainer, trainer, torch.ones(len(ratios)), lengths, engine_log_probs=engine)


@pytest.mark.parametrize(
    ("correction", "weights", "affected"),
    [
        (Truncated(cap=2.0), [1.5, 2, 0.4, 1], [0, 1, 0, 0]),
        (Truncated(cap=4.0, level="sequence"), [4, 4, 0.4, 0.4], [1, 1, 0, 0]),
        (Masked(low=0.5, high=2.0), [1.5, 0, 0, 1], [0, 1, 1, 0]),
        (Masked(low=0.2, high=4.0, level="sequence"), [0, 0, 0.4, 0.4], [1, 1, 0, 0]),
    ],
    ids=["truncated tokens", "truncated sequences", "masked tokens", "masked sequences"],
)
def test_by_hand(correction, weights, affected) -> None:
    actual, metrics = correction.correct(tokens_with(RATIOS, [2, 2]))
    assert actual.tolist() == pytest.approx(weights, rel=1e-6)
    fraction = metrics[f"importance_{correction.name}_fraction"]
    assert fraction.tolist() == [bool(x) for x in affected]
    assert metrics["importance_weight"] is actual


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("kind", [Truncated, Masked])
@given(log_probs=st.lists(st.floats(-20, 0), min_size=1, max_size=12))
def test_equal_log_probs_change_nothing(kind, level, log_probs) -> None:
    values = torch.tensor(log_probs)
    weights, _ = kind(level=level).correct(scored_tokens(values, values, torch.ones_like(values)))
    assert weights.tolist() == [1.0] * len(log_probs)


def test_the_weights_carry_no_gradient_and_stay_finite() -> None:
    """On-policy the log-probs before the update are the differentiable ones."""
    log_probs = torch.tensor([0.0, -1.0], requires_grad=True)
    tokens = scored_tokens(log_probs, log_probs, torch.ones(2), engine_log_probs=torch.tensor([-1e4, 0.0]))
    for correction in (Truncated(), Masked(), Truncated(level="sequence")):
        weights, _ = correction.correct(tokens)
        assert not weights.requires_grad and torch.isfinite(weights).all()


def test_mismatch_metrics_by_hand() -> None:
    """Ratios trainer / engine of 1, 4 and 0.8."""
    log_ratios = [0.0, math.log(4), math.log(0.8)]
    engine = torch.tensor([-2.0, -3.0, -1.0])
    means, maxima = mismatch_metrics(engine + torch.tensor(log_ratios), engine)
    assert means["mean_log_prob_gap"].tolist() == pytest.approx([0, math.log(4), -math.log(0.8)], abs=1e-6)
    assert means["kl_k1"].tolist() == pytest.approx([-d for d in log_ratios], abs=1e-6)
    assert means["kl_k3"].tolist() == pytest.approx([math.exp(d) - 1 - d for d in log_ratios], abs=1e-6)
    assert means["ratio_tail_fraction"].tolist() == [False, True, False]
    assert maxima["max_ratio"].tolist() == pytest.approx([1, 4, 0.8], rel=1e-6)
    assert maxima["max_log_prob_gap"].max().item() == pytest.approx(math.log(4), rel=1e-6)
