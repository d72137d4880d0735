"""Log-probs and entropy over a vocabulary that is sharded across tensor-parallel ranks.

The logits keep their dtype and are converted to fp32 in chunks of tokens, forward and backward, so an fp32 copy of all
logits never exists; the softmax is recomputed in the backward pass instead of being stored. Megatron pads the
vocabulary for divisibility; padded columns are excluded. (Megatron-core's vocab-parallel cross entropy keeps an fp32
softmax of all tokens and includes the padding.)

With p = softmax(z / T) and H = -sum_k p_k log p_k, the gradients with respect to the logits are
d log p_y / d z_j = (1[j = y] - p_j) / T and d H / d z_j = -p_j (log p_j + H) / T.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

_CHUNK_BYTES = 64 * 1024 * 1024
"""Size of one fp32 chunk of logits."""


@dataclass(frozen=True)
class VocabularyShard:
    """The columns of the logits that this rank holds."""

    first: int
    """Token id of the first column."""
    num_valid: int
    """Number of columns that are real tokens; the rest are padding."""
    group: dist.ProcessGroup | None
    """Tensor-parallel group; None without tensor parallelism."""

    @classmethod
    def for_this_rank(cls, width: int, vocab_size: int) -> "VocabularyShard":
        """
        Args:
            width: number of columns on this rank, the same on every rank.
            vocab_size: rows of the HF embedding; Megatron's padding rows are not scored.
        """
        first = width * parallel_state.get_tensor_model_parallel_rank()
        several = parallel_state.get_tensor_model_parallel_world_size() > 1
        return cls(
            first=first,
            num_valid=min(max(vocab_size - first, 0), width),
            group=parallel_state.get_tensor_model_parallel_group() if several else None,
        )


def log_probs_and_entropy(
    logits: Tensor, targets: Tensor, temperature: float, shard: VocabularyShard, entropy_gradient: bool = False
) -> tuple[Tensor, Tensor]:
    """log_softmax(logits / temperature) at the targets, and the entropy of that distribution.

    Args:
        logits: [num_tokens, columns on this rank], any float dtype, differentiable.
        targets: [num_tokens] int64 token ids.
        shard: the columns of the vocabulary on this rank.
        entropy_gradient: make the entropy differentiable. Otherwise the backward pass stores and computes nothing for
            it.

    Returns:
        log-probs [num_tokens] float32, differentiable; entropy [num_tokens] float32 in nats, differentiable on request.
        Both are the same on all tensor-parallel ranks, and so must be the gradients passed back.
    """
    return _LogProbs.apply(logits, targets, temperature, shard, entropy_gradient)


class _LogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, temperature: float, shard: VocabularyShard, entropy_gradient: bool
    ) -> tuple[Tensor, Tensor]:
        log_probs = torch.empty(len(targets), dtype=torch.float32, device=logits.device)
        entropy = torch.empty_like(log_probs)
        log_normaliser = torch.empty_like(log_probs)
        for chunk in _chunks(*logits.shape):
            scaled = _scaled(logits[chunk], temperature, shard)
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
        ctx.save_for_backward(logits, targets, log_normaliser, entropy if entropy_gradient else None)
        ctx.temperature, ctx.shard = temperature, shard
        if not entropy_gradient:
            ctx.mark_non_differentiable(entropy)
        return log_probs, entropy

    @staticmethod
    def backward(ctx: Any, grad_log_probs: Tensor, grad_entropy: Tensor) -> tuple[Tensor, None, None, None, None]:
        logits, targets, log_normaliser, entropy = ctx.saved_tensors
        shard = ctx.shard
        grad_logits = torch.empty_like(logits)
        grad_logits[:, shard.num_valid :] = 0
        for chunk in _chunks(*logits.shape):
            chunk_entropy = None if entropy is None else (entropy[chunk], grad_entropy[chunk] / ctx.temperature)
            grad_logits[chunk, : shard.num_valid] = _chunk_gradient(
                _scaled(logits[chunk], ctx.temperature, shard).sub_(log_normaliser[chunk][:, None]),
                targets[chunk],
                (grad_log_probs[chunk] / ctx.temperature)[:, None],
                chunk_entropy,
                shard,
            )
        return grad_logits, None, None, None, None


def _chunk_gradient(
    log_softmax: Tensor,
    targets: Tensor,
    upstream: Tensor,
    entropy: tuple[Tensor, Tensor] | None,
    shard: VocabularyShard,
) -> Tensor:
    """Gradient with respect to the logits, in the memory of `log_softmax`. A separate function, so that the temporaries
    of a chunk are freed before the next one.

    Args:
        log_softmax: [n, num_valid] fp32.
        targets: [n] int64.
        upstream: [n, 1], the gradient with respect to the log-probs, divided by the temperature.
        entropy: [n] each: the entropy, and the gradient with respect to it divided by the temperature; None without an
            entropy gradient.
    """
    if entropy is None:
        gradient = log_softmax.exp_().mul_(-upstream)
    else:
        softmax = log_softmax.exp()
        value, entropy_upstream = (x[:, None] for x in entropy)
        # -p (upstream + entropy_upstream (log p + H))
        gradient = log_softmax.add_(value).mul_(entropy_upstream).add_(upstream).mul_(softmax.neg_())
    columns, is_mine = _local_columns(targets, shard)
    if shard.num_valid:
        gradient.scatter_add_(1, columns[:, None], upstream * is_mine[:, None])
    return gradient


def _chunks(num_tokens: int, width: int) -> list[slice]:
    tokens = max(1, _CHUNK_BYTES // (4 * max(1, width)))
    return [slice(start, start + tokens) for start in range(0, num_tokens, tokens)]


def _scaled(logits: Tensor, temperature: float, shard: VocabularyShard) -> Tensor:
    """New fp32 tensor [len(logits), num_valid]: the logits without padding, divided by the temperature."""
    return logits[:, : shard.num_valid].to(torch.float32, copy=True).div_(temperature)


def _local_columns(targets: Tensor, shard: VocabularyShard) -> tuple[Tensor, Tensor]:
    """Column of each target on this rank (0 if another rank holds it), and whether this rank holds it."""
    columns = targets - shard.first
    is_mine = (columns >= 0) & (columns < shard.num_valid)
    return torch.where(is_mine, columns, 0), is_mine


def _pick(shifted: Tensor, columns: Tensor, is_mine: Tensor) -> Tensor:
    if shifted.shape[1] == 0:
        return torch.zeros(shifted.shape[0], dtype=shifted.dtype, device=shifted.device)
    return torch.where(is_mine, shifted.gather(1, columns[:, None])[:, 0], 0.0)


def _lowest(scaled: Tensor) -> Tensor:
    return torch.full((scaled.shape[0],), torch.finfo(torch.float32).min, device=scaled.device)


def _all_reduce(values: Tensor, operation: dist.ReduceOp.RedOpType, shard: VocabularyShard) -> Tensor:
    if shard.group is not None:
        dist.all_reduce(values, op=operation, group=shard.group)
    return values
