"""Policy losses per scored token.

A loss is a function of the log-probs of the scored tokens; it knows nothing of batches. How tokens are weighed into one
number is said in `aggregations.py`.
"""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from megatron_dsrl.config.phase import LOSSES
from megatron_dsrl.config.registry import Options

_LARGEST_LOG_RATIO = 20.0
"""Nat; ratios stay finite."""


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
    from_older_weights: Tensor | None = None
    """1 for tokens that older weights produced than those that are updated now, else 0. None: no token."""

    def mean_of_sequences(self, values: Tensor) -> Tensor:
        """[num_tokens]: for every token the mean of [num_tokens] values over its sequence."""
        return self._over_sequences(values, divide_by_length=True)

    def sum_of_sequences(self, values: Tensor) -> Tensor:
        """[num_tokens]: for every token the sum of [num_tokens] values over its sequence."""
        return self._over_sequences(values, divide_by_length=False)

    def _over_sequences(self, values: Tensor, divide_by_length: bool) -> Tensor:
        lengths = torch.tensor(self.num_scored, device=values.device)
        sequences = torch.arange(len(self.num_scored), device=values.device).repeat_interleave(lengths)
        totals = values.new_zeros(len(self.num_scored)).index_add(0, sequences, values)
        return (totals / lengths.clamp(min=1) if divide_by_length else totals)[sequences]


@dataclass(frozen=True)
class TokenLosses:
    """Loss of each scored token."""

    losses: Tensor
    """[num_tokens] float32, differentiable."""

    metrics: dict[str, Tensor] = field(default_factory=dict)
    """Per name [num_tokens], what the step reports as a mean over its tokens; the same names for every batch."""


PolicyLoss = Callable[[ScoredTokens], TokenLosses]


class LossOptions(Options):
    """Base of policy losses: the fields are the options, `of_tokens` computes."""

    on_policy_only: ClassVar[bool] = False
    """Whether it is wrong for samples of another policy than the one that takes the step."""

    @abstractmethod
    def of_tokens(self, tokens: ScoredTokens) -> TokenLosses:
        """The loss of every token."""


@LOSSES.register
class DualClip(LossOptions):
    """PPO's clipped surrogate with the dual clip for negative advantages."""

    name: Literal["dual_clip"] = "dual_clip"

    clip_low: float = Field(default=0.2, ge=0, lt=1)
    """The ratio is clipped below at 1 - clip_low."""

    clip_high: float = Field(default=0.2, ge=0)
    """The ratio is clipped above at 1 + clip_high."""

    dual_clip: float | None = Field(default=10.0, gt=1)
    """c: for A < 0 the loss of a token is at most -A c; null turns the dual clip off."""

    def of_tokens(self, tokens: ScoredTokens) -> TokenLosses:
        ratio = probability_ratio(tokens.log_probs - tokens.old_log_probs)
        losses, cut = clipped_surrogate(ratio, tokens.advantages, self.clip_low, self.clip_high, self.dual_clip)
        return TokenLosses(losses, {"clip_fraction": cut})


@LOSSES.register
class PolicyGradient(LossOptions):
    """REINFORCE: l = -A log pi. No ratio and no clip, so it is for one optimizer step per rollout batch."""

    name: Literal["policy_gradient"] = "policy_gradient"
    on_policy_only: ClassVar[bool] = True

    def of_tokens(self, tokens: ScoredTokens) -> TokenLosses:
        return TokenLosses(-tokens.advantages * tokens.log_probs)


@LOSSES.register
class GSPO(LossOptions):
    """Group sequence policy optimization (arXiv 2507.18071): one ratio per sequence, the geometric mean of its tokens'.

    Belongs with `aggregation: sequence_mean`, under which it is the paper's objective. The paper's clip is as narrow
    as these defaults because the ratio of a sequence moves much less than those of tokens.
    """

    name: Literal["gspo"] = "gspo"

    clip_low: float = Field(default=3e-4, ge=0, lt=1)
    """The ratio is clipped below at 1 - clip_low."""

    clip_high: float = Field(default=4e-4, ge=0)
    """The ratio is clipped above at 1 + clip_high."""

    def of_tokens(self, tokens: ScoredTokens) -> TokenLosses:
        ratio = sequence_ratio(tokens)
        losses, cut = clipped_surrogate(ratio, tokens.advantages, self.clip_low, self.clip_high, dual_clip=None)
        return TokenLosses(losses, {"clip_fraction": cut})


@LOSSES.register
class CISPO(LossOptions):
    """Clipped importance sampling (arXiv 2506.13585): l = -stop(clip(ratio)) A log pi.

    The weight is clipped and not the update, so no token loses its gradient. The paper leaves the lower bound off and
    tunes the upper one, whose value it does not give; 5 is what the experiments of arXiv 2510.13786 lie around.
    """

    name: Literal["cispo"] = "cispo"

    clip_low: float = Field(default=1.0, ge=0, le=1)
    """The weight is clipped below at 1 - clip_low; 1 is no lower bound."""

    clip_high: float = Field(default=4.0, ge=0)
    """The weight is clipped above at 1 + clip_high."""

    def of_tokens(self, tokens: ScoredTokens) -> TokenLosses:
        ratio = probability_ratio(tokens.log_probs.detach() - tokens.old_log_probs)
        weight = ratio.clamp(1.0 - self.clip_low, 1.0 + self.clip_high)
        return TokenLosses(-weight * tokens.advantages * tokens.log_probs, {"clip_fraction": weight != ratio})


@LOSSES.register
class Supervised(LossOptions):
    """Negative log-likelihood whatever the advantages; with `filter: positive`, fine-tuning on the right samples."""

    name: Literal["supervised"] = "supervised"

    def of_tokens(self, tokens: ScoredTokens) -> TokenLosses:
        return supervised_loss(tokens)


def supervised_loss(tokens: ScoredTokens) -> TokenLosses:
    """Negative log-likelihood, for supervised training with the same actor; nothing else enters."""
    return TokenLosses(-tokens.log_probs)


def probability_ratio(log_ratio: Tensor) -> Tensor:
    """exp of a log-ratio of any shape, clamped to +-20 nats so that it stays finite."""
    return torch.exp(log_ratio.clamp(-_LARGEST_LOG_RATIO, _LARGEST_LOG_RATIO))


def sequence_ratio(tokens: ScoredTokens) -> Tensor:
    """GSPO's ratio of every token's sequence: s = exp(mean over its tokens of (log pi - log pi_old)).

    Its gradient at a token is that of GSPO-token (of the same paper, arXiv 2507.18071), s * grad log pi of that
    token: equal to the gradient of s where the tokens of a sequence share their advantage and weight, and well-defined
    where they do not.

    Returns:
        [num_tokens].
    """
    ratio = probability_ratio(tokens.mean_of_sequences((tokens.log_probs - tokens.old_log_probs).detach()))
    return ratio * torch.exp(tokens.log_probs - tokens.log_probs.detach())


def clipped_surrogate(
    ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float, dual_clip: float | None
) -> tuple[Tensor, Tensor]:
    """PPO's clipped surrogate (arXiv 1707.06347) with the dual clip (arXiv 1912.09729).

    l = max(-A rho, -A clip(rho, 1 - low, 1 + high)); where A < 0 also l = min(l, -A c).

    Args:
        ratio: [num_tokens] rho, differentiable.
        advantages: [num_tokens] A.
        clip_low: rho is clipped below at 1 - clip_low.
        clip_high: rho is clipped above at 1 + clip_high.
        dual_clip: c; None for no dual clip.

    Returns:
        losses [num_tokens], and [num_tokens] bool: where a clip has cut the gradient.
    """
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    losses = torch.maximum(unclipped, clipped)
    cut = clipped > unclipped
    if dual_clip is None:
        return losses, cut
    ceiling = -advantages * dual_clip
    over_ceiling = (advantages < 0) & (losses > ceiling)
    return torch.where(over_ceiling, ceiling, losses), cut | over_ceiling
