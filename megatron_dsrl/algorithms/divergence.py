"""Per-token estimators of a KL divergence, in the reward and in the loss.

With the log-ratio d = log pi(y_t) - log ref(y_t) of a token that was sampled from pi, KL(pi || ref) is estimated by

    k1 = d                       unbiased, may be negative
    k2 = d^2 / 2                 biased, never negative
    k3 = exp(-d) - 1 + d         unbiased, never negative

(J. Schulman, "Approximating KL divergence", 2020). In the reward only these values count. In the loss it is their
*gradients* that count, and those are another matter, since the sampling distribution depends on the parameters too:

- k1 differentiated as it stands gives grad log pi, whose expectation is 0: no constraint at all. `kl_loss` therefore
  gives k1 its score-function gradient d * grad log pi, the unbiased gradient of KL(pi || ref) of this token's
  distribution. (What the token does to the divergence of later ones is left out, as is usual in the loss; in the reward
  it counts.)
- k2's own gradient is that same d * grad log pi: unbiased.
- k3's own gradient is (1 - exp(-d)) * grad log pi, whose expectation is the gradient of KL(ref || pi), the other
  direction; the two agree to first order in d. GRPO (arXiv 2402.03300) uses it so, and so does `kl_loss`.

All of this holds on-policy; after the first step of several on the same samples the estimates are those of the policy
that sampled.
"""

from torch import Tensor

from megatron_dsrl.config.phase import KLEstimator

_LARGEST_LOG_RATIO = 20.0
"""Nat; k3's exponential stays finite."""


def kl_estimate(log_probs: Tensor, reference_log_probs: Tensor, estimator: KLEstimator) -> Tensor:
    """The estimate of every token, in nats; differentiating it is not what the loss wants, see `kl_loss`.

    Args:
        log_probs: [num_tokens] float, under the policy that sampled the tokens.
        reference_log_probs: [num_tokens] float.
        estimator: which one.
    """
    ratio = (log_probs - reference_log_probs).clamp(-_LARGEST_LOG_RATIO, _LARGEST_LOG_RATIO)
    match estimator:
        case "k1":
            return ratio
        case "k2":
            return ratio.square() / 2
        case "k3":
            return (-ratio).expm1() + ratio


def kl_loss(log_probs: Tensor, reference_log_probs: Tensor, estimator: KLEstimator) -> Tensor:
    """The estimate of every token with the gradient that the module's docstring gives for it.

    Args:
        log_probs: [num_tokens] float, of the policy being trained, differentiable.
        reference_log_probs: [num_tokens] float.
        estimator: which one.

    Returns:
        [num_tokens].
    """
    if estimator != "k1":
        return kl_estimate(log_probs, reference_log_probs, estimator)
    gradient = kl_estimate(log_probs, reference_log_probs, "k2")
    return kl_estimate(log_probs, reference_log_probs, "k1").detach() + gradient - gradient.detach()
