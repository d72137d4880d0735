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
    logits: Tensor, positions: Tensor, targets: Tensor, temperature: float, shard: VocabularyShard
) -> tuple[Tensor, Tensor]:
    """log_softmax(logits / temperature) at the targets, and the entropy of that distribution.

    Args:
        logits: [rows, columns of this rank], any float dtype, differentiable.
        positions: [num_tokens] int64, the row that predicts each token; no row more than once.
        targets: [num_tokens] int64 token ids.
        temperature: the sampling temperature.
        shard: which columns of the vocabulary these are.

    Returns:
        log-probs [num_tokens] float32, differentiable; entropy [num_tokens] float32 in nats, without gradient.
    """
    return _LogProbs.apply(logits, positions, targets, temperature, shard)


class _LogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, positions, targets, temperature, shard):
        log_probs = torch.empty(len(positions), dtype=torch.float32, device=logits.device)
        entropy = torch.empty_like(log_probs)
        log_normaliser = torch.empty_like(log_probs)
        for chunk in _chunks(len(positions), logits.shape[1]):
            scaled = _scaled_rows(logits, positions[chunk], temperature, shard)
            maximum = _all_reduce(scaled.amax(-1) if shard.num_valid else _lowest(scaled), dist.ReduceOp.MAX, shard)
            shifted = scaled.sub_(maximum[:, None])
            exponentials = shifted.exp()
            columns, is_mine = _local_columns(targets[chunk], shard)
            sums = torch.stack(
                [exponentials.sum(-1), exponentials.mul_(shifted).sum(-1), _pick(shifted, columns, is_mine)]
            )
            normaliser, weighted, at_target = _all_reduce(sums, dist.ReduceOp.SUM, shard)
            log_normaliser[chunk] = maximum + normaliser.log()
            log_probs[chunk] = at_target - normaliser.log()
            entropy[chunk] = normaliser.log() - weighted / normaliser
        ctx.save_for_backward(logits, positions, targets, log_normaliser)
        ctx.temperature, ctx.shard = temperature, shard
        ctx.mark_non_differentiable(entropy)
        return log_probs, entropy

    @staticmethod
    def backward(ctx, grad_log_probs, _grad_entropy):
        logits, positions, targets, log_normaliser = ctx.saved_tensors
        temperature, shard = ctx.temperature, ctx.shard
        grad_logits = torch.zeros_like(logits)
        for chunk in _chunks(len(positions), logits.shape[1]):
            grad = (grad_log_probs[chunk] / temperature)[:, None]
            scaled = _scaled_rows(logits, positions[chunk], temperature, shard)
            grad_chunk = scaled.sub_(log_normaliser[chunk][:, None]).exp_().mul_(-grad)
            columns, is_mine = _local_columns(targets[chunk], shard)
            if shard.num_valid:
                grad_chunk.scatter_add_(1, columns[:, None], grad * is_mine[:, None])
            grad_logits[:, : shard.num_valid].index_copy_(0, positions[chunk], grad_chunk.to(logits.dtype))
        return grad_logits, None, None, None, None


def _chunks(num_tokens: int, width: int) -> list[slice]:
    tokens = max(1, _CHUNK_BYTES // (4 * max(1, width)))
    return [slice(start, start + tokens) for start in range(0, num_tokens, tokens)]


def _scaled_rows(logits: Tensor, positions: Tensor, temperature: float, shard: VocabularyShard) -> Tensor:
    """New fp32 tensor [len(positions), num_valid]: the rows without padding, divided by the temperature."""
    return logits.index_select(0, positions)[:, : shard.num_valid].float() / temperature


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
