"""The mismatch between the engine, which samples, and the trainer, which scores: its metrics and its correction.

Both hold the same weights, but their kernels and precisions differ, so samples come from a slightly different policy
than the gradient assumes. The correction multiplies the loss of a token by the detached ratio w = pi_trainer /
pi_engine of its probabilities before the update, and limits the effect of large ratios:

- `truncated` (TIS): min(w, cap). F. Yao et al., "Your efficient RL framework secretly brings you off-policy RL
  training" (2025).
- `masked` (MIS): w within [low, high], 0 outside; a masked token still counts in the denominator of the loss. J. Liu
  et al., "When speed kills stability" (2025); arXiv 2510.18855 masks tokens in the same way.

At `sequence` level all tokens share the product of their sequence's token ratios: unbiased for the sequence, but with
larger variance. Equal log-probs give w = 1 and change nothing.
"""

from abc import abstractmethod
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from megatron_dsrl.algorithms.losses import ScoredTokens, probability_ratio
from megatron_dsrl.config.choices import IMPORTANCE_CORRECTIONS
from megatron_dsrl.config.registry import Options

Level = Literal["token", "sequence"]

RATIO_BOUNDS = (0.5, 2.0)
"""Ratios outside these bounds count as tail."""

MISMATCH_MEANS = ("mean_log_prob_gap", "kl_k1", "kl_k3", "ratio_tail_fraction")
MISMATCH_MAXIMA = ("max_log_prob_gap", "max_ratio")


class ImportanceCorrectionOptions(Options):
    """Base class of importance corrections: fields are options, `correct` computes."""

    @abstractmethod
    def correct(self, tokens: ScoredTokens) -> tuple[Tensor, dict[str, Tensor]]:
        """Detached factors for the token losses, [num_tokens], and metrics like those of `TokenLosses`."""


@IMPORTANCE_CORRECTIONS.register
class Truncated(ImportanceCorrectionOptions):
    """TIS (F. Yao et al., 2025): clamp ratios to at most a cap."""

    name: Literal["truncated"] = "truncated"

    cap: float = Field(default=2.0, ge=1)
    """Largest factor."""

    level: Level = "token"
    """Whether the ratio is per token or per sequence."""

    def correct(self, tokens: ScoredTokens) -> tuple[Tensor, dict[str, Tensor]]:
        ratio = importance_ratio(tokens, self.level)
        weight = ratio.clamp(max=self.cap)
        return weight, {"importance_weight": weight, "importance_truncated_fraction": ratio > self.cap}


@IMPORTANCE_CORRECTIONS.register
class Masked(ImportanceCorrectionOptions):
    """MIS (J. Liu et al., 2025; arXiv 2510.18855): drop tokens or sequences whose ratio lies outside the bounds."""

    name: Literal["masked"] = "masked"

    low: float = Field(default=0.5, ge=0, le=1)
    """Smallest ratio that is kept."""

    high: float = Field(default=2.0, ge=1)
    """Largest ratio that is kept."""

    level: Level = "token"
    """Whether the ratio is per token or per sequence."""

    @model_validator(mode="after")
    def _bounds_differ(self) -> "Masked":
        if self.low == self.high:
            raise ValueError("low must be below high")
        return self

    def correct(self, tokens: ScoredTokens) -> tuple[Tensor, dict[str, Tensor]]:
        ratio = importance_ratio(tokens, self.level)
        masked = (ratio < self.low) | (ratio > self.high)
        weight = torch.where(masked, 0.0, ratio)
        return weight, {"importance_weight": weight, "importance_masked_fraction": masked}


def importance_ratio(tokens: ScoredTokens, level: Level) -> Tensor:
    """pi_trainer / pi_engine before the update, [num_tokens]: per token, or of each token's whole sequence."""
    assert tokens.engine_log_probs is not None, "without an engine there is nothing to compare with"
    log_ratio = tokens.old_log_probs.detach() - tokens.engine_log_probs
    return probability_ratio(tokens.sum_of_sequences(log_ratio) if level == "sequence" else log_ratio)


def mismatch_metrics(
    trainer_log_probs: Tensor, engine_log_probs: Tensor
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Per-token mismatch metrics: those to be averaged, and those to be maximised.

    With the log-ratio d = log pi_trainer - log pi_engine of a token sampled by the engine, KL(engine || trainer) is
    estimated by k1 = -d (unbiased, may be negative) and k3 = exp(d) - 1 - d (unbiased, never negative; J. Schulman,
    "Approximating KL divergence", 2020).

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
