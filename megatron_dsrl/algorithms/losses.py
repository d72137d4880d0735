"""Losses per scored token, and how tokens are weighed into one number.

A loss is a function of the log-probs of the scored tokens; it knows nothing of batches. `token_mean_weights` turns the
global batch into one weight per sequence, so that micro-batches, packing and data parallelism only ever add up
`weight * loss` and cannot change the result. (The authors' released configuration averages per micro-batch, where
they do; this project departs from it on purpose.)
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from megatron_dsrl.config.phase import DualClipLossConfig


@dataclass(frozen=True)
class ScoredTokens:
    """The scored tokens of some whole sequences, one sequence after the other. Every tensor is [num_tokens] float32."""

    log_probs: Tensor
    """Of the policy being trained, differentiable."""
    entropy: Tensor
    """Of its next-token distribution, nat; differentiable where the objective says that it needs that."""
    old_log_probs: Tensor
    """Of the policy that took the step's first gradient, on the same scored sequence."""
    engine_log_probs: Tensor
    """Of the policy that sampled."""
    reference_log_probs: Tensor | None
    """Of the reference policy, on the same scored sequence."""
    advantages: Tensor
    num_scored: tuple[int, ...]
    """Tokens of each sequence; they sum to num_tokens."""


@dataclass(frozen=True)
class TokenLosses:
    """Loss of each scored token."""

    losses: Tensor
    """[num_tokens] float32, differentiable."""

    metrics: dict[str, Tensor] = field(default_factory=dict)
    """Per name [num_tokens], what the step reports as a mean over its tokens; the same names for every batch."""


PolicyLoss = Callable[[ScoredTokens], TokenLosses]


def dual_clip_loss(tokens: ScoredTokens, config: DualClipLossConfig) -> TokenLosses:
    """PPO's clipped surrogate (arXiv 1707.06347) with the dual clip (arXiv 1912.09729).

    rho = exp(clamp(lp - lp_old, -20, 20)); l = max(-A rho, -A clip(rho, 1 - low, 1 + high));
    where A < 0 also l = min(l, -A c). The metric `clip_fraction` marks tokens whose gradient a clip has cut.
    """
    advantages = tokens.advantages
    ratio = torch.exp((tokens.log_probs - tokens.old_log_probs).clamp(-20.0, 20.0))
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1.0 - config.clip_low, 1.0 + config.clip_high)
    losses = torch.maximum(unclipped, clipped)
    cut = clipped > unclipped
    ceiling = -advantages * config.dual_clip
    over_ceiling = (advantages < 0) & (losses > ceiling)
    return TokenLosses(torch.where(over_ceiling, ceiling, losses), {"clip_fraction": cut | over_ceiling})


def supervised_loss(tokens: ScoredTokens) -> TokenLosses:
    """Negative log-likelihood, for supervised training with the same actor; nothing else enters."""
    return TokenLosses(-tokens.log_probs)


def make_policy_loss(config: DualClipLossConfig) -> PolicyLoss:
    """The loss function that a phase's configuration describes."""
    return partial(dual_clip_loss, config=config)


def token_mean_weights(num_scored: Sequence[int]) -> Tensor:
    """Weight of each sequence's tokens for the token mean over the *global* batch: sum(l) / (number of tokens).

    Args:
        num_scored: kept scored tokens of every sequence in the optimizer step, over all data-parallel ranks.

    Returns:
        [num_sequences] float32; all tokens of a sequence share its weight.
    """
    total = sum(num_scored)
    return torch.full((len(num_scored),), 1.0 / total if total else 0.0, dtype=torch.float32)
