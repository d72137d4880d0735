"""The dual-clip loss against numbers worked by hand, and its gradient."""

import math

import pytest
import torch

from megatron_dsrl.algorithms.aggregations import token_mean_weights
from megatron_dsrl.algorithms.losses import DualClip, ScoredTokens


def tokens(log_probs, old_log_probs, advantages):
    zeros = torch.zeros_like(advantages)
    return ScoredTokens(log_probs, zeros, old_log_probs, zeros, None, advantages, (len(zeros),))


CONFIG = DualClip(clip_low=0.2, clip_high=0.3, dual_clip=3.0)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "clipped"),
    [
        (1.0, 2.0, -2.0, False),
        (1.5, 2.0, -2.6, True),  # better than allowed: clipped at 1.3
        (0.5, 2.0, -1.0, False),  # worse: never clipped
        (0.5, -2.0, 1.6, True),  # pushed down further than allowed: clipped at 0.8
        (1.5, -2.0, 3.0, False),
        (4.0, -2.0, 6.0, True),  # dual clip: at most -A c = 6
    ],
)
def test_dual_clip_by_hand(ratio, advantage, loss, clipped):
    log_probs = torch.tensor([math.log(ratio) - 1.0], requires_grad=True)
    result = CONFIG.of_tokens(tokens(log_probs, torch.tensor([-1.0]), torch.tensor([advantage])))
    assert result.losses.item() == pytest.approx(loss, rel=1e-6)
    assert result.metrics["clip_fraction"].item() is clipped
    result.losses.sum().backward()
    assert (log_probs.grad.item() == 0) is clipped


def test_on_policy_the_gradient_is_the_policy_gradient():
    log_probs = torch.tensor([-0.5, -1.5], dtype=torch.float64, requires_grad=True)
    advantages = torch.tensor([0.7, -0.2], dtype=torch.float64)
    CONFIG.of_tokens(tokens(log_probs, log_probs.detach(), advantages)).losses.sum().backward()
    assert torch.equal(log_probs.grad, -advantages)


def test_an_exploding_ratio_stays_finite():
    result = CONFIG.of_tokens(tokens(torch.tensor([0.0]), torch.tensor([-1000.0]), torch.tensor([-1.0])))
    assert result.losses.item() == 3.0


def test_token_mean_gives_every_token_of_the_global_batch_the_same_weight():
    weights = token_mean_weights([3, 1, 4])
    assert weights.tolist() == [0.125] * 3
    assert token_mean_weights([]).tolist() == []
