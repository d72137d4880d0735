"""Mismatch metrics by hand."""

import math

import pytest
import torch

from megatron_dsrl.algorithms.mismatch import mismatch_metrics


def test_by_hand() -> None:
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
