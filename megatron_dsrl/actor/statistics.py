"""Sums over scored tokens, added up over micro-batches and ranks into the metrics of an update."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class TokenStatistics:
    """Sums and maxima over the scored tokens of some micro-batches."""

    sums: Tensor
    """[5] float64: weighted loss, entropy, clipped tokens, |log-prob - engine log-prob|, tokens."""
    maximum_gap: Tensor
    """[1] float64: largest |log-prob - engine log-prob|."""

    @classmethod
    def of_tokens(
        cls, loss: Tensor, entropy: Tensor, clipped: Tensor, log_probs: Tensor, engine_log_probs: Tensor
    ) -> "TokenStatistics":
        """Statistics of one micro-batch: `loss` is its scalar, the others are [S]."""
        gap = (log_probs.detach() - engine_log_probs).abs().double()
        sums = torch.stack([
            loss.detach().double(),
            entropy.double().sum(),
            clipped.double().sum(),
            gap.sum(),
            torch.tensor(gap.numel(), dtype=torch.float64, device=gap.device),
        ])
        return cls(sums, gap.max()[None] if gap.numel() else gap.new_zeros(1))

    @classmethod
    def over_all_ranks(cls, parts: list["TokenStatistics"], device: torch.device) -> "TokenStatistics":
        """Add up the parts of every rank; a rank that has nothing of its own to add passes an empty list."""
        sums = torch.stack([torch.zeros(5, dtype=torch.float64, device=device), *(part.sums for part in parts)]).sum(0)
        maximum = torch.stack([sums.new_zeros(1), *(part.maximum_gap for part in parts)]).amax(0)
        dist.all_reduce(sums)
        dist.all_reduce(maximum, op=dist.ReduceOp.MAX)
        return cls(sums, maximum)


@dataclass(frozen=True)
class UpdateMetrics:
    """What one or more optimizer steps on one rollout batch did. The same on every rank."""

    loss: float
    entropy: float
    """Mean over the updated tokens, nat."""
    clip_fraction: float
    mean_log_prob_gap: float
    """Mean |trainer - engine| log-prob over the updated tokens, nat. In the pre-train space the two are conditioned
    differently, and this is the gap between log P(y) and log P(y|x)."""
    max_log_prob_gap: float
    kept_samples: int
    kept_tokens: int
    grad_norm: float
    """Before clipping."""
    learning_rate: float

    @classmethod
    def of_step(
        cls, statistics: TokenStatistics, kept_samples: int, grad_norm: float, learning_rate: float
    ) -> "UpdateMetrics":
        """Metrics of one optimizer step."""
        loss, entropy, clipped, gap, tokens = statistics.sums.tolist()
        return cls(
            loss=loss,
            entropy=entropy / tokens,
            clip_fraction=clipped / tokens,
            mean_log_prob_gap=gap / tokens,
            max_log_prob_gap=statistics.maximum_gap.item(),
            kept_samples=kept_samples,
            kept_tokens=int(tokens),
            grad_norm=grad_norm,
            learning_rate=learning_rate,
        )

    @classmethod
    def merge(cls, steps: list["UpdateMetrics"]) -> "UpdateMetrics":
        """Several optimizer steps as one: counts are summed, the gap maximum is kept, means weigh tokens; loss and
        gradient norm are plain means over the steps."""
        assert steps
        tokens = sum(step.kept_tokens for step in steps)

        def token_mean(name: str) -> float:
            return sum(getattr(step, name) * step.kept_tokens for step in steps) / tokens

        return cls(
            loss=sum(step.loss for step in steps) / len(steps),
            entropy=token_mean("entropy"),
            clip_fraction=token_mean("clip_fraction"),
            mean_log_prob_gap=token_mean("mean_log_prob_gap"),
            max_log_prob_gap=max(step.max_log_prob_gap for step in steps),
            kept_samples=sum(step.kept_samples for step in steps),
            kept_tokens=tokens,
            grad_norm=sum(step.grad_norm for step in steps) / len(steps),
            learning_rate=steps[-1].learning_rate,
        )
