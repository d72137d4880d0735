"""Log-probs and entropy of a vocabulary that is split over tensor-parallel ranks.

The logits stay in their own dtype and are turned to fp32 in chunks of tokens, forward and backward, so that no fp32
copy of all logits ever exists; the softmax is recomputed in the backward pass instead of being stored. Megatron pads
the vocabulary for divisibility: padded columns do not take part. (Megatron-core's own vocab-parallel cross entropy
keeps an fp32 softmax of all tokens and counts the padding in.)
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

_CHUNK_BYTES = 64 * 1024 * 1024
"""Size of one fp32 chunk of logits."""


@dataclass(frozen=True)
class VocabularyShard:
    """The columns of the logits that this rank holds."""

    first: int
    """Token id of the first column."""
    num_valid: int
    """Columns that are real tokens; the ones behind them are padding."""
    group: dist.ProcessGroup | None
    """Tensor-parallel group; None for one rank."""


def log_probs_and_entropy(
    logits: Tensor, targets: Tensor, temperature: float, shard: VocabularyShard
) -> tuple[Tensor, Tensor]:
    """log_softmax(logits / temperature) at the targets, and the entropy of that distribution.

    Args:
        logits: [num_tokens, columns of this rank], any float dtype, differentiable.
        targets: [num_tokens] int64 token ids.
        temperature: the sampling temperature.
        shard: which columns of the vocabulary these are.

    Returns:
        log-probs [num_tokens] float32, differentiable; entropy [num_tokens] float32 in nats, without gradient.
    """
    return _LogProbs.apply(logits, targets, temperature, shard)


class _LogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, targets, temperature, shard):
        num_tokens = logits.shape[0]
        log_probs = torch.empty(num_tokens, dtype=torch.float32, device=logits.device)
        entropy = torch.empty_like(log_probs)
        log_normaliser = torch.empty_like(log_probs)
        for rows in _chunks(logits):
            scaled = logits[rows, : shard.num_valid].float() / temperature
            maximum = _all_reduce(scaled.amax(-1) if shard.num_valid else _lowest(scaled), dist.ReduceOp.MAX, shard)
            shifted = scaled.sub_(maximum[:, None])
            exponentials = shifted.exp()
            columns, is_mine = _local_columns(targets[rows], shard)
            sums = torch.stack(
                [exponentials.sum(-1), exponentials.mul_(shifted).sum(-1), _pick(shifted, columns, is_mine)]
            )
            normaliser, weighted, at_target = _all_reduce(sums, dist.ReduceOp.SUM, shard)
            log_normaliser[rows] = maximum + normaliser.log()
            log_probs[rows] = at_target - normaliser.log()
            entropy[rows] = normaliser.log() - weighted / normaliser
        ctx.save_for_backward(logits, targets, log_normaliser)
        ctx.temperature, ctx.shard = temperature, shard
        ctx.mark_non_differentiable(entropy)
        return log_probs, entropy

    @staticmethod
    def backward(ctx, grad_log_probs, _grad_entropy):
        logits, targets, log_normaliser = ctx.saved_tensors
        temperature, shard = ctx.temperature, ctx.shard
        grad_logits = torch.zeros_like(logits)
        for rows in _chunks(logits):
            grad = (grad_log_probs[rows] / temperature)[:, None]
            scaled = logits[rows, : shard.num_valid].float() / temperature
            grad_chunk = (scaled - log_normaliser[rows][:, None]).exp_().mul_(-grad)
            columns, is_mine = _local_columns(targets[rows], shard)
            if shard.num_valid:
                grad_chunk.scatter_add_(1, columns[:, None], grad * is_mine[:, None])
            grad_logits[rows, : shard.num_valid] = grad_chunk.to(logits.dtype)
        return grad_logits, None, None, None


def _chunks(logits: Tensor) -> list[slice]:
    rows = max(1, _CHUNK_BYTES // (4 * max(1, logits.shape[1])))
    return [slice(start, start + rows) for start in range(0, logits.shape[0], rows)]


def _local_columns(targets: Tensor, shard: VocabularyShard) -> tuple[Tensor, Tensor]:
    """Column of each target on this rank (0 where it is another rank's), and whether it is this rank's."""
    columns = targets - shard.first
    is_mine = (columns >= 0) & (columns < shard.num_valid)
    return torch.where(is_mine, columns, 0), is_mine


def _pick(shifted: Tensor, columns: Tensor, is_mine: Tensor) -> Tensor:
    if shifted.shape[1] == 0:
        return torch.zeros(shifted.shape[0], dtype=shifted.dtype, device=shifted.device)
    return torch.where(is_mine, shifted.gather(1, columns[:, None])[:, 0], 0.0)


def _lowest(scaled: Tensor) -> Tensor:
    return torch.full((scaled.shape[0],), torch.finfo(torch.float32).min, device=scaled.device)


def _all_reduce(values: Tensor, operation: dist.ReduceOp, shard: VocabularyShard) -> Tensor:
    if shard.group is not None:
        dist.all_reduce(values, op=operation, group=shard.group)
    return values
