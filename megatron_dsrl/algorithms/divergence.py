"""Per-token KL divergence estimators for the reward and the loss.

With the log-ratio d = log pi(y_t) - log ref(y_t) of a token that was sampled from pi, KL(pi || ref) is estimated by

    k1 = d                       unbiased, may be negative
    k2 = d^2 / 2                 biased, never negative
    k3 = exp(-d) - 1 + d         unbiased, never negative

(J. Schulman, "Approximating KL divergence", 2020). In the reward only these values matter. In the loss their
*gradients* matter, and unbiased values do not imply unbiased gradients, since the sampling distribution depends on the
parameters too:

- Differentiating k1 directly gives grad log pi. Its expectation is 0: no constraint at all. `kl_loss` therefore
  gives k1 the score-function gradient d * grad log pi, the unbiased gradient of KL(pi || ref) of this token's
  distribution. (The token's effect on the divergence of later tokens is ignored, as is usual in the loss; the reward
  includes it.)
- The gradient of k2 is the same d * grad log pi: unbiased.
- The gradient of k3 is (1 - exp(-d)) * grad log pi. Its expectation is the gradient of KL(ref || pi), the other
  direction; the two agree to first order in d. GRPO (arXiv 2402.03300) uses it, and so does `kl_loss`.

All of this holds on-policy. After the first of several steps on the same samples, the samples come from an older
policy, so neither values nor gradients are exactly unbiased.
"""

from torch import Tensor

from megatron_dsrl.config.phase import KLEstimator

_LARGEST_LOG_RATIO = 20.0
"""In nats; keeps the exponential of k3 finite."""


def kl_estimate(log_probs: Tensor, reference_log_probs: Tensor, estimator: KLEstimator) -> Tensor:
    """Estimate for each token, in nats. Do not differentiate it for a loss: use `kl_loss`.

    Args:
        log_probs: [num_tokens] float, under the policy that sampled the tokens.
        reference_log_probs: [num_tokens] float.
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
    """Estimate for each token, [num_tokens], with the gradient described in the module docstring."""
    if estimator != "k1":
        return kl_estimate(log_probs, reference_log_probs, estimator)
    gradient = kl_estimate(log_probs, reference_log_probs, "k2")
    return kl_estimate(log_probs, reference_log_probs, "k1").detach() + gradient - gradient.detach()
