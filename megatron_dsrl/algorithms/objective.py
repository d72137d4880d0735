"""An objective: experience, token loss, aggregation, and a coefficient.

A phase has one or more objectives. Their losses are summed (each over its own denominator). `build_objectives` creates
them from the phase's configuration.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from megatron_dsrl.algorithms.aggregations import token_mean_weights
from megatron_dsrl.algorithms.divergence import kl_estimate, kl_loss
from megatron_dsrl.algorithms.experience import Experience, PerToken
from megatron_dsrl.algorithms.losses import PolicyLoss, ScoredTokens, TokenLosses
from megatron_dsrl.config.phase import KLConfig, ObjectiveConfig, PhaseConfig


def with_advantages(experience: Experience, objective: ObjectiveConfig) -> Experience:
    """Compute advantages over all samples of a whole rollout batch with the results of the passes in `required_passes`,
    then keep those that pass the filter and have a scored token.

    A dropped sample would have a zero token mask and contribute nothing to the loss or its denominator, so it is left
    out instead of being computed and multiplied by zero.
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


Aggregation = Callable[[Sequence[int]], Tensor]
"""Scored tokens of each sequence of an optimizer step -> [num_sequences] float32, the weight of its tokens."""


@dataclass(frozen=True)
class Objective:
    """One term of the loss of an optimizer step."""

    experience: Experience
    """With advantages."""
    loss: PolicyLoss
    coefficient: float = 1.0
    """Factor on the loss."""
    aggregation: Aggregation = token_mean_weights
    name: str = "policy"
    """Prefix of its metrics."""
    needs_entropy_gradient: bool = False
    """Whether the loss differentiates through the entropy."""
    needs_every_sample: bool = True
    """Whether samples have a gradient even if their advantage is zero at every token."""

    @property
    def samples_with_gradient(self) -> list[int]:
        """Indices of the samples that can have a gradient."""
        if self.needs_every_sample:
            return list(range(len(self.experience)))
        assert self.experience.advantages is not None, "call with_advantages first"
        return [i for i, advantages in enumerate(self.experience.advantages) if advantages.any()]

    def mini_batches(self, count: int) -> list["Objective"]:
        """The objective on each of `count` consecutive parts of its experience."""
        return [replace(self, experience=part) for part in self.experience.mini_batches(count)]


def build_objectives(
    phase: PhaseConfig, experiences: Sequence[Experience], max_response_tokens: int
) -> list[Objective]:
    """The terms of a phase's loss. There is one experience per entry of `phase.objectives`, in that order: the whole
    rollout batch in that objective's space, with the results of the passes in `required_passes`."""
    return [
        Objective(
            experience=with_advantages(experience, objective),
            loss=partial(token_losses, objective),
            coefficient=objective.coefficient,
            aggregation=partial(objective.aggregation.weights, max_response_tokens=max_response_tokens),
            name=name,
            needs_entropy_gradient=objective.entropy_coefficient > 0,
            needs_every_sample=needs_every_sample(objective),
        )
        for (name, objective), experience in zip(phase.objectives.items(), experiences, strict=True)
    ]


def needs_every_sample(objective: ObjectiveConfig) -> bool:
    """Whether the loss of a sample can have a gradient if its advantage is zero at every token: from the policy loss,
    the KL term or the entropy bonus. An importance correction only scales the policy loss."""
    with_kl_loss = objective.kl is not None and objective.kl.loss_coefficient > 0
    return with_kl_loss or objective.entropy_coefficient > 0 or not objective.loss.vanishes_without_advantage


def token_losses(objective: ObjectiveConfig, tokens: ScoredTokens) -> TokenLosses:
    """Loss of each token: the policy loss with its importance correction, the KL term, and the entropy bonus.

    l = w l_policy + beta KL - alpha H. The correction w applies only to the policy-gradient term.
    """
    tokens = with_behaviour_log_probs(objective, tokens)
    result = objective.loss.token_losses(tokens)
    losses, metrics = result.losses, dict(result.metrics)
    if objective.importance_correction is not None:
        weights, correction_metrics = objective.importance_correction.correct(tokens)
        losses, metrics = losses * weights, metrics | correction_metrics
    if objective.kl is not None:
        assert tokens.reference_log_probs is not None, "run the reference pass first: see required_passes"
        divergence = kl_loss(tokens.log_probs, tokens.reference_log_probs, objective.kl.loss_estimator)
        metrics["reference_kl"] = divergence
        if objective.kl.loss_coefficient > 0:
            losses = losses + objective.kl.loss_coefficient * divergence
    if objective.entropy_coefficient > 0:
        assert tokens.entropy.requires_grad or not tokens.log_probs.requires_grad, "the entropy carries no gradient"
        losses = losses - objective.entropy_coefficient * tokens.entropy
    return TokenLosses(losses, metrics)


def with_behaviour_log_probs(objective: ObjectiveConfig, tokens: ScoredTokens) -> ScoredTokens:
    """Use the engine's log-probs as old log-probs for tokens generated by older weights.

    The ratio and its clipping are then relative to the behaviour policy, as in PPO. There are two exceptions. With an
    importance correction, which already weighs by pi_old / pi_engine, the ratio stays relative to the policy before the
    update (the decoupled objective of arXiv 2505.24298). In the pre-train space the engine's log-probs, conditioned on
    the prompt, belong to another distribution, so these tokens are treated as generated by the policy before the
    update.
    """
    if tokens.from_older_weights is None or objective.importance_correction is not None:
        return tokens
    if not objective.space.prompt_in_context:
        return tokens
    assert tokens.engine_log_probs is not None, "tokens from older weights have engine log-probs"
    older = tokens.from_older_weights.bool()
    return replace(tokens, old_log_probs=torch.where(older, tokens.engine_log_probs, tokens.old_log_probs))
