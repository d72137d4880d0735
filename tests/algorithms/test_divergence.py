"""KL estimators: values by hand, and over a whole distribution what their values and gradients are in expectation."""

import math

import pytest
import torch

from megatron_dsrl.algorithms.divergence import kl_estimate, kl_loss

LOGITS = torch.tensor([0.3, -1.0, 0.8, 0.1], dtype=torch.float64)
REFERENCE = torch.tensor([0.4, 0.1, 0.2, 0.3], dtype=torch.float64).log()


def test_estimates_by_hand() -> None:
    log_probs, reference = torch.tensor([math.log(0.5)]), torch.tensor([math.log(0.25)])
    values = [kl_estimate(log_probs, reference, kind).item() for kind in ("k1", "k2", "k3")]
    assert values == pytest.approx([math.log(2), math.log(2) ** 2 / 2, 0.5 - 1 + math.log(2)], rel=1e-6)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_k1_and_k3_are_unbiased(estimator) -> None:
    """The expectation over all four tokens is the KL divergence itself."""
    log_probs = LOGITS.log_softmax(0)
    kl = torch.nn.functional.kl_div(REFERENCE, log_probs, log_target=True, reduction="sum")
    expectation = (log_probs.exp() * kl_estimate(log_probs, REFERENCE, estimator)).sum()
    torch.testing.assert_close(expectation, kl, rtol=1e-12, atol=0)


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_k2_and_k3_are_never_negative(estimator) -> None:
    log_probs = LOGITS.log_softmax(0)
    assert (kl_estimate(log_probs, REFERENCE, estimator) >= 0).all()
    assert kl_estimate(log_probs, log_probs, estimator).abs().max() == 0


@pytest.mark.parametrize(("estimator", "direction"), [("k1", "reverse"), ("k2", "reverse"), ("k3", "forward")])
def test_expected_gradients_of_the_loss(estimator, direction) -> None:
    """k1 and k2 have the gradient of KL(pi || ref); k3 has that of KL(ref || pi)."""
    logits = LOGITS.clone().requires_grad_()
    log_probs = logits.log_softmax(0)
    # tokens are sampled from pi; their probabilities are not differentiated, as those of real samples are not
    expected_loss = (log_probs.detach().exp() * kl_loss(log_probs, REFERENCE, estimator)).sum()
    (gradient,) = torch.autograd.grad(expected_loss, logits, retain_graph=True)
    left, right = (log_probs, REFERENCE) if direction == "reverse" else (REFERENCE, log_probs)
    (expected,) = torch.autograd.grad((left.exp() * (left - right)).sum(), logits)
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-14)


def test_the_loss_has_the_values_of_the_estimates() -> None:
    log_probs = LOGITS.log_softmax(0)
    for estimator in ("k1", "k2", "k3"):
        values = kl_estimate(log_probs, REFERENCE, estimator)
        torch.testing.assert_close(kl_loss(log_probs, REFERENCE, estimator), values, rtol=1e-12, atol=1e-15)


def test_a_token_that_the_reference_excludes_stays_finite() -> None:
    log_probs = torch.tensor([0.0], requires_grad=True)
    for estimator in ("k1", "k2", "k3"):
        assert torch.isfinite(kl_loss(log_probs, torch.tensor([-1e4]), estimator)).all()
        assert torch.isfinite(kl_loss(log_probs, torch.tensor([1e4]), estimator)).all()
