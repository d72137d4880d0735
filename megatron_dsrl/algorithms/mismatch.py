"""Mismatch between the trainer's log-probs and those of the engine, which should be the same policy.

With the log-ratio d = log pi_trainer - log pi_engine of a token sampled by the engine, KL(engine || trainer) is
estimated by k1 = -d (unbiased, may be negative) and k3 = exp(d) - 1 - d (unbiased, never negative; J. Schulman,
"Approximating KL divergence", 2020).
"""

from torch import Tensor

from megatron_dsrl.algorithms.losses import probability_ratio

RATIO_BOUNDS = (0.5, 2.0)
"""Ratios outside these bounds count as tail."""

MISMATCH_MEANS = ("mean_log_prob_gap", "kl_k1", "kl_k3", "ratio_tail_fraction")
MISMATCH_MAXIMA = ("max_log_prob_gap", "max_ratio")


def mismatch_metrics(
    trainer_log_probs: Tensor, engine_log_probs: Tensor
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Per-token mismatch metrics: those to be averaged, and those to be maximised.

    Args:
        trainer_log_probs: [num_tokens] float32, under the trainer's policy before the update.
        engine_log_probs: [num_tokens] float32.

    Returns:
        Keyed by MISMATCH_MEANS and by MISMATCH_MAXIMA, [num_tokens] float64 or bool each: |d| in nats, the KL
        estimators in nats, whether exp(d) lies outside RATIO_BOUNDS, and exp(d).
    """
    log_ratio = trainer_log_probs.detach().double() - engine_log_probs.double()  # k3 of near-equal log-probs is tiny
    gap, ratio = log_ratio.abs(), probability_ratio(log_ratio)
    in_tail = (ratio < RATIO_BOUNDS[0]) | (ratio > RATIO_BOUNDS[1])
    means = (gap, -log_ratio, ratio - 1.0 - log_ratio, in_tail)
    return dict(zip(MISMATCH_MEANS, means)), dict(zip(MISMATCH_MAXIMA, (gap, ratio)))
