"""An objective: experience, the loss of its tokens, how tokens are weighed, and the factor of the whole.

A phase has one, or several whose losses are added up (each over its own denominator). `objectives_of` makes them from
the phase's configuration.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from megatron_dsrl.algorithms.aggregations import token_mean_weights
from megatron_dsrl.algorithms.divergence import kl_loss
from megatron_dsrl.algorithms.experience import Experience, with_advantages
from megatron_dsrl.algorithms.losses import PolicyLoss, ScoredTokens, TokenLosses
from megatron_dsrl.config.phase import ObjectiveConfig, PhaseConfig

Aggregation = Callable[[Sequence[int]], Tensor]
"""Scored tokens of every sequence of an optimizer step -> [num_sequences] float32, the weight of its tokens."""


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
    """First part of the names of its metrics."""
    needs_entropy_gradient: bool = False
    """The loss differentiates through the entropy."""

    def mini_batches(self, count: int) -> list["Objective"]:
        """The objective on each of `count` consecutive parts of its experience."""
        return [replace(self, experience=part) for part in self.experience.mini_batches(count)]


def objectives_of(
    phase: PhaseConfig, experiences: Sequence[Experience], max_response_tokens: int
) -> list[Objective]:
    """The terms of a phase's loss.

    Args:
        phase: the phase.
        experiences: one for each of `phase.objectives`, in that order: the same whole rollout batch in the space of
            each, with the results of the passes that `required_passes` names.
        max_response_tokens: `rollout.max_response_tokens`.
    """
    return [
        Objective(
            experience=with_advantages(experience, objective),
            loss=partial(token_losses, objective),
            coefficient=objective.coefficient,
            aggregation=partial(objective.aggregation.weights, max_response_tokens=max_response_tokens),
            name=name,
            needs_entropy_gradient=objective.entropy_coefficient > 0,
        )
        for (name, objective), experience in zip(phase.objectives.items(), experiences, strict=True)
    ]


def token_losses(objective: ObjectiveConfig, tokens: ScoredTokens) -> TokenLosses:
    """Loss of each token: the policy loss with its importance correction, the KL term, and the entropy bonus.

    l = w l_policy + beta KL - alpha H. The correction w is about where policy-gradient samples came from; the KL term
    and the entropy are taken as they are.
    """
    tokens = with_behaviour_log_probs(objective, tokens)
    result = objective.loss.of_tokens(tokens)
    losses, metrics = result.losses, dict(result.metrics)
    if objective.importance_correction is not None:
        weights, of_correction = objective.importance_correction.correct(tokens)
        losses, metrics = losses * weights, metrics | of_correction
    if objective.kl is not None:
        assert tokens.reference_log_probs is not None, "the reference pass comes first: see required_passes"
        divergence = kl_loss(tokens.log_probs, tokens.reference_log_probs, objective.kl.loss_estimator)
        metrics["reference_kl"] = divergence
        if objective.kl.loss_coefficient > 0:
            losses = losses + objective.kl.loss_coefficient * divergence
    if objective.entropy_coefficient > 0:
        assert tokens.entropy.requires_grad or not tokens.log_probs.requires_grad, "the entropy carries no gradient"
        losses = losses - objective.entropy_coefficient * tokens.entropy
    return TokenLosses(losses, metrics)


def with_behaviour_log_probs(objective: ObjectiveConfig, tokens: ScoredTokens) -> ScoredTokens:
    """Where older weights produced a token, the old log-prob is theirs: the engine's, from when it was sampled.

    The ratio, and its clipping, is then one to the policy that acted, as PPO has it. Two cases are different. An
    importance correction weighs pi_old / pi_engine already, so the ratio stays one to the policy before the update (the
    decoupled objective of arXiv 2505.24298). In the pre-train space the engine's log-probs, which had the prompt in
    context, are those of another distribution: such tokens are taken as if the policy before the update had produced
    them.
    """
    if tokens.from_older_weights is None or objective.importance_correction is not None:
        return tokens
    if not objective.space.prompt_in_context:
        return tokens
    older = tokens.from_older_weights.bool()
    return replace(tokens, old_log_probs=torch.where(older, tokens.engine_log_probs, tokens.old_log_probs))
