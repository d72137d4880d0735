"""Every policy loss against numbers worked by hand, its published formula, and its gradient in float64."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_dsrl.algorithms.aggregations import SequenceMean
from megatron_dsrl.algorithms.losses import CISPO, GSPO, DualClip, LossOptions, PolicyGradient, Supervised
from megatron_dsrl.config.phase import LOSSES
from tests.support.experiences import scored_tokens

DUAL_CLIP = DualClip(clip_low=0.2, clip_high=0.3, dual_clip=3.0)


def float64(*values: float, differentiable: bool = False) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=differentiable)


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
def test_dual_clip_by_hand(ratio, advantage, loss, clipped) -> None:
    log_probs = float64(math.log(ratio) - 1.0, differentiable=True)
    result = DUAL_CLIP.token_losses(scored_tokens(log_probs, float64(-1.0), float64(advantage)))
    assert result.losses.item() == pytest.approx(loss, rel=1e-12)
    assert result.metrics["clip_fraction"].item() is clipped
    result.losses.sum().backward()
    assert (log_probs.grad.item() == 0) is clipped


@pytest.mark.parametrize("loss_class", LOSSES.classes(), ids=lambda loss_class: loss_class.__name__)
def test_what_vanishes_without_advantage(loss_class) -> None:
    """Value and gradient of a sequence, independent of its ratios and its neighbour's."""
    old = float64(-9.0, -1.0, -0.1, -2.0, -1.0)
    log_probs = float64(-0.5, -1.0, -4.0, -1.9, -1.5, differentiable=True)
    advantages = float64(0.0, 0.0, 0.0, 1.0, 1.0)
    losses = loss_class().token_losses(scored_tokens(log_probs, old, advantages, num_scored=[3, 2])).losses
    losses.sum().backward()
    vanishes = not losses[:3].any() and not log_probs.grad[:3].any()
    assert loss_class.vanishes_without_advantage is vanishes
    assert losses[3:].all() and log_probs.grad[3:].any()


def test_without_the_dual_clip_the_loss_of_a_negative_advantage_has_no_ceiling() -> None:
    tokens = scored_tokens(float64(math.log(40.0)), float64(0.0), float64(-2.0))
    assert DualClip(dual_clip=None).token_losses(tokens).losses.item() == pytest.approx(80)


@pytest.mark.parametrize("ratio", [0.5, 1.0, 3.0, 7.0])
def test_cispo_by_hand(ratio) -> None:
    """The weight min(ratio, 5) is a constant: l = -w A log pi, and no token loses its gradient."""
    log_probs = float64(math.log(ratio) - 1.0, differentiable=True)
    result = CISPO().token_losses(scored_tokens(log_probs, float64(-1.0), float64(-2.0)))
    weight = min(ratio, 5.0)
    assert result.losses.item() == pytest.approx(2 * weight * (math.log(ratio) - 1))
    result.losses.sum().backward()
    assert log_probs.grad.item() == pytest.approx(2 * weight)
    assert result.metrics["clip_fraction"].item() is (ratio > 5)


def test_cispo_with_a_lower_bound() -> None:
    log_probs = float64(math.log(0.1) - 1.0, differentiable=True)
    CISPO(clip_low=0.5).token_losses(scored_tokens(log_probs, float64(-1.0), float64(1.0))).losses.sum().backward()
    assert log_probs.grad.item() == pytest.approx(-0.5)


def gspo_objective(log_probs, old_log_probs, advantages, lengths, low, high) -> torch.Tensor:
    """The objective of arXiv 2507.18071 sample by sample, with a differentiable sequence ratio; to be maximised."""
    terms = []
    for lp, old, advantage in zip(log_probs.split(lengths), old_log_probs.split(lengths), advantages):
        ratio = ((lp - old).sum() / len(lp)).exp()
        terms.append(torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage))
    return torch.stack(terms).mean()


def test_gspo_equals_its_objective_and_gradient() -> None:
    """With the mean over sequences; of each clipping case one sequence."""
    lengths = [3, 1, 4, 2]
    old = float64(-1.0, -2.0, -0.5, -1.5, -0.3, -0.7, -1.1, -0.9, -2.0, -1.0)
    moved = float64(0.1, -0.2, 0.3, 0.4, 0.02, -0.01, 0.01, -0.03, -0.5, -0.4)
    advantages = float64(1.0, -1.0, 0.5, -0.8)
    log_probs = (old + moved).requires_grad_()
    expected = -gspo_objective(log_probs, old, advantages, lengths, 0.02, 0.05)
    (expected_gradient,) = torch.autograd.grad(expected, log_probs)

    counts = torch.tensor(lengths)
    tokens = scored_tokens(log_probs, old, advantages.repeat_interleave(counts), lengths)
    result = GSPO(clip_low=0.02, clip_high=0.05).token_losses(tokens)
    weights = SequenceMean().weights(lengths, max_response_tokens=99).double().repeat_interleave(counts)
    loss = (result.losses * weights).sum()
    (gradient,) = torch.autograd.grad(loss, log_probs)
    # weights are float32
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-6, atol=1e-12)
    # up with A > 0 beyond 1.05, and down with A < 0 below 0.98, are cut
    assert result.metrics["clip_fraction"].tolist() == [True] * 3 + [False] * 1 + [False] * 4 + [True] * 2


@given(values=st.lists(st.tuples(*[st.floats(-3, 0)] * 2, st.floats(-2, 2)), min_size=1, max_size=8))
def test_gspo_equals_grpo_for_responses_of_one_token(values) -> None:
    log_probs, old, advantages = (float64(*column) for column in zip(*values))
    log_probs.requires_grad_()
    results = []
    for loss in (GSPO(clip_low=0.2, clip_high=0.3), DualClip(clip_low=0.2, clip_high=0.3, dual_clip=None)):
        losses = loss.token_losses(scored_tokens(log_probs, old, advantages, [1] * len(values))).losses
        results.append((losses.detach(), torch.autograd.grad(losses.sum(), log_probs)[0]))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("loss", [DUAL_CLIP, GSPO(), CISPO(), PolicyGradient()], ids=lambda loss: loss.name)
def test_on_policy_every_loss_has_the_policy_gradient(loss) -> None:
    log_probs = float64(-0.5, -1.5, -0.2, differentiable=True)
    advantages = float64(0.7, 0.7, -0.2)
    loss.token_losses(scored_tokens(log_probs, log_probs.detach(), advantages, [2, 1])).losses.sum().backward()
    torch.testing.assert_close(log_probs.grad, -advantages, rtol=0, atol=1e-15)


@pytest.mark.parametrize("loss", [DUAL_CLIP, PolicyGradient(), Supervised()], ids=lambda loss: loss.name)
def test_gradients_are_those_of_the_values(loss: LossOptions) -> None:
    """By finite differences. GSPO and CISPO are left out: their gradients are not those of their values, by design."""
    generator = torch.Generator().manual_seed(0)
    old, advantages = torch.randn(2, 40, generator=generator, dtype=torch.float64)
    log_probs = (old + torch.randn(40, generator=generator, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: loss.token_losses(scored_tokens(x, old, advantages)).losses, log_probs)


@pytest.mark.parametrize("loss", [DUAL_CLIP, GSPO(), CISPO()], ids=lambda loss: loss.name)
@pytest.mark.parametrize("log_ratio", [-1000.0, 1000.0])
def test_an_exploding_ratio_stays_finite(loss, log_ratio) -> None:
    log_probs = float64(log_ratio, differentiable=True)
    losses = loss.token_losses(scored_tokens(log_probs, float64(0.0), float64(-1.0))).losses
    losses.sum().backward()
    assert torch.isfinite(losses).all() and torch.isfinite(log_probs.grad).all()


@pytest.mark.parametrize("loss", [DUAL_CLIP, GSPO(), CISPO(), PolicyGradient()], ids=lambda loss: loss.name)
def test_samples_without_advantage_have_no_gradient(loss) -> None:
    log_probs = float64(-0.5, -1.5, differentiable=True)
    loss.token_losses(scored_tokens(log_probs, float64(-0.7, -1.1), float64(0.0, 0.0))).losses.sum().backward()
    assert log_probs.grad.abs().max() == 0


def test_no_sequence_at_all_is_no_loss() -> None:
    """A rank with an empty micro-batch still takes part."""
    nothing = float64(differentiable=True)
    for loss in (DUAL_CLIP, GSPO(), CISPO()):
        assert loss.token_losses(scored_tokens(nothing, nothing.detach(), nothing.detach(), [0])).losses.shape == (0,)
