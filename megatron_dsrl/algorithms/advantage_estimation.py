"""From rewards to advantages: estimate them for all samples, then keep the samples that the filter accepts."""

from dataclasses import replace

import torch

from megatron_dsrl.algorithms.divergence import kl_estimate
from megatron_dsrl.algorithms.experience import Experience, PerToken
from megatron_dsrl.config.phase import KLConfig, ObjectiveConfig


def with_advantages(experience: Experience, objective: ObjectiveConfig) -> Experience:
    """Compute advantages over all samples, then keep those that pass the filter and have a scored token.

    A dropped sample would have a zero token mask and contribute nothing to the loss or its denominator, so it is left
    out instead of being computed and multiplied by zero.

    Args:
        experience: a whole rollout batch, with the results of the passes in `required_passes(objective)`.
    """
    experience = estimate_advantages(experience, objective)
    keep = objective.filter.keep(experience) & (torch.tensor(experience.num_scored) > 0)
    if objective.drop_truncated:
        keep &= ~experience.truncated
    return experience.select(keep.nonzero().flatten().tolist())


def estimate_advantages(experience: Experience, objective: ObjectiveConfig) -> Experience:
    """Add advantages, and returns with a critic, for all samples. Unlike `with_advantages`, drops nothing."""
    if objective.kl is not None and objective.kl.reward_coefficient > 0:
        experience = replace(experience, penalties=kl_penalties(experience, objective.kl))
    estimate = objective.advantage.estimate(experience)
    return replace(experience, advantages=estimate.advantages, returns=estimate.returns)


def kl_penalties(experience: Experience, config: KLConfig) -> PerToken:
    """KL divergence from the reference at each token, estimated before the update, times `reward_coefficient`."""
    assert experience.old_log_probs is not None and experience.reference_log_probs is not None, "see required_passes"
    return tuple(
        config.reward_coefficient * kl_estimate(old, reference, config.reward_estimator)
        for old, reference in zip(experience.old_log_probs, experience.reference_log_probs)
    )
