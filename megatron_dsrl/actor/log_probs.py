"""Output layer, log-probs and entropy over a vocabulary that is sharded across tensor-parallel ranks.

With a vocabulary of 150,000 the logits of all tokens are the largest tensor of an update. Here they never exist as a
whole: the output layer is applied to blocks of the vocabulary, and their softmax statistics are combined while they
pass (the online softmax of arXiv 1805.02867). Peak memory therefore does not depend on the number of tokens. The
backward pass needs the logits again. Up to a limit they are kept, beyond it a block is computed a second time. A block
of the weight's gradient is written once, so accumulating into a main gradient costs no more than without blocks.

Logits keep the parameters' dtype; softmax and gradients are computed from an fp32 copy of one block at a time. Megatron
pads the vocabulary for divisibility; padded columns are excluded.

With p = softmax(z / T) and H = -sum_k p_k log p_k, the gradients with respect to the logits are
d log p_y / d z_j = (1[j = y] - p_j) / T and d H / d z_j = -p_j (log p_j + H) / T.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_dsrl.model.output_rows import FactoredLogits

BLOCK_BYTES = 32 * 1024 * 1024
"""Size of one block of logits in fp32."""


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
        """The shard of a rank with `width` columns, of `vocab_size` rows of the HF embedding: Megatron's padding rows
        are not scored."""
        first = width * parallel_state.get_tensor_model_parallel_rank()
        several = parallel_state.get_tensor_model_parallel_world_size() > 1
        return cls(
            first=first,
            num_valid=min(max(vocab_size - first, 0), width),
            group=parallel_state.get_tensor_model_parallel_group() if several else None,
        )


@dataclass(frozen=True)
class LogProbOptions:
    """How log-probs are computed from hidden states."""

    shard: VocabularyShard
    temperature: float = 1.0
    """Logits are divided by it."""
    entropy_gradient: bool = False
    """Make the entropy differentiable. Otherwise the backward pass stores and computes nothing for it."""
    kept_bytes: int = 0
    """Logits that are kept for the backward pass; those beyond are computed again."""
    block_bytes: int = BLOCK_BYTES
    """Size of a block of logits in fp32; a block has at least one column."""


def log_probs_and_entropy(logits: FactoredLogits, targets: Tensor, options: LogProbOptions) -> tuple[Tensor, Tensor]:
    """log_softmax(logits / temperature) at the targets, and the entropy of that distribution.

    Args:
        logits: [num_tokens, columns on this rank], differentiable.
        targets: [num_tokens] int64 token ids.

    Returns:
        log-probs [num_tokens] float32, differentiable; entropy [num_tokens] float32 in nats, differentiable on request.
        Both are the same on all tensor-parallel ranks, and so must be the gradients passed back.
    """
    kept_bytes = options.kept_bytes if torch.is_grad_enabled() else 0
    return _LogProbs.apply(logits.hidden, logits.weight, targets, options, kept_bytes, logits.fused_gradient)


class _LogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        options: LogProbOptions,
        kept_bytes: int,
        fused_gradient: bool,
    ) -> tuple[Tensor, Tensor]:
        """Streams over blocks of the vocabulary; keeps the logits of the first blocks, up to `kept_bytes`."""
        statistics, kept = _Statistics.of_no_columns(len(hidden), hidden.device), []
        for block in _blocks(len(hidden), options):
            logits = hidden @ weight[block].t()
            if (kept_bytes := kept_bytes - logits.nbytes) >= 0:
                kept.append(logits)
            statistics.add(_scaled(logits, options), targets - options.shard.first - block.start)
            del logits  # before the next block takes memory
        log_normaliser, log_probs, entropy = statistics.over_ranks(options.shard)
        ctx.save_for_backward(
            hidden, weight, targets, log_normaliser, entropy if options.entropy_gradient else None, *kept
        )
        ctx.options = options
        # Not saved as a tensor: it is changed in place while other layers still wait for their backward passes.
        ctx.main_grad = weight.main_grad if fused_gradient and hasattr(weight, "main_grad") else None
        if not options.entropy_gradient:
            ctx.mark_non_differentiable(entropy)
        return log_probs, entropy

    @staticmethod
    def backward(ctx: Any, grad_log_probs: Tensor, grad_entropy: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of `hidden` and `weight`, from kept or recomputed logits; see `log_probs_and_entropy`."""
        hidden, weight, targets, log_normaliser, entropy, *kept = ctx.saved_tensors
        shard, temperature = ctx.options.shard, ctx.options.temperature
        grad_hidden = torch.zeros_like(hidden, dtype=torch.float32)
        weight_gradient = _WeightGradient.of(weight, ctx.main_grad) if ctx.needs_input_grad[1] else None
        upstream = (grad_log_probs / temperature)[:, None]
        entropy_terms = None if entropy is None else (entropy[:, None], (grad_entropy / temperature)[:, None])
        for number, block in enumerate(_blocks(len(hidden), ctx.options)):
            logits = kept[number] if number < len(kept) else hidden @ weight[block].t()
            grad_logits = _block_gradient(
                _scaled(logits, ctx.options).sub_(log_normaliser[:, None]),
                targets - shard.first - block.start,
                upstream,
                entropy_terms,
            ).to(hidden.dtype)
            if hidden.dtype == torch.float32:
                grad_hidden.addmm_(grad_logits, weight[block])
            else:
                grad_hidden += grad_logits @ weight[block]
            if weight_gradient is not None:
                weight_gradient.write(block, grad_logits, hidden)
            del logits, grad_logits
        grad_weight = None if weight_gradient is None else weight_gradient.for_autograd(shard.num_valid)
        return grad_hidden.to(hidden.dtype), grad_weight, None, None, None, None


@dataclass
class _Statistics:
    """Softmax statistics of the columns so far; [num_tokens] fp32 each."""

    maximum: Tensor
    normaliser: Tensor
    """Sum of exp(z - maximum)."""
    weighted: Tensor
    """Sum of exp(z - maximum) (z - maximum)."""
    at_target: Tensor
    """z at the target; 0 unless a column so far is the target."""
    has_target: Tensor
    """[num_tokens] bool: whether the target is among the columns so far."""

    @classmethod
    def of_no_columns(cls, num_tokens: int, device: torch.device) -> "_Statistics":
        """The state before the first block."""
        # The lowest finite number: with -inf, 0 times a difference of maxima would not be 0.
        maximum = torch.full((num_tokens,), torch.finfo(torch.float32).min, device=device)
        normaliser, weighted, at_target = torch.zeros(3, num_tokens, device=device)
        has_target = torch.zeros(num_tokens, dtype=torch.bool, device=device)
        return cls(maximum, normaliser, weighted, at_target, has_target)

    def add(self, scaled: Tensor, columns: Tensor) -> None:
        """Add a block of columns, [num_tokens, columns] fp32, which is overwritten. `columns` is [num_tokens] int64,
        the column of the target in this block; outside its bounds elsewhere."""
        is_here = (columns >= 0) & (columns < scaled.shape[1])
        at_target = scaled.gather(1, torch.where(is_here, columns, 0)[:, None])[:, 0]
        self.at_target = torch.where(is_here, at_target, self.at_target)
        self.has_target |= is_here
        self._move_to(torch.maximum(self.maximum, scaled.amax(-1)))
        shifted = scaled.sub_(self.maximum[:, None])
        exponentials = shifted.exp()
        self.normaliser += exponentials.sum(-1)
        self.weighted += exponentials.mul_(shifted).sum(-1)

    def over_ranks(self, shard: VocabularyShard) -> tuple[Tensor, Tensor, Tensor]:
        """log of the sum of exp(z), log-prob of the target, and entropy. Collective over the shard's group."""
        if shard.group is not None:
            maximum = self.maximum.clone()
            dist.all_reduce(maximum, op=dist.ReduceOp.MAX, group=shard.group)
            self._move_to(maximum)
        at_target = torch.where(self.has_target, self.at_target - self.maximum, 0.0)
        sums = torch.stack([self.normaliser, self.weighted, at_target])
        if shard.group is not None:
            dist.all_reduce(sums, group=shard.group)
        normaliser, weighted, at_target = sums
        logarithm = normaliser.log()
        return self.maximum + logarithm, at_target - logarithm, logarithm - weighted / normaliser

    def _move_to(self, maximum: Tensor) -> None:
        """Express the sums relative to a maximum that is at least the current one."""
        difference = self.maximum - maximum
        factor = difference.exp()
        self.weighted = factor * (self.weighted + difference * self.normaliser)
        self.normaliser, self.maximum = factor * self.normaliser, maximum


@dataclass
class _WeightGradient:
    """Gradient of this rank's output layer, written block by block."""

    target: Tensor
    """[columns, hidden]: a new tensor for autograd, or Megatron's fp32 main gradient."""
    weight: Tensor
    is_main_gradient: bool

    @classmethod
    def of(cls, weight: Tensor, main_grad: Tensor | None) -> "_WeightGradient":
        """The gradient of a weight [columns, hidden]; added to `main_grad` unless that is None."""
        return cls(torch.empty_like(weight) if main_grad is None else main_grad, weight, main_grad is not None)

    def write(self, block: slice, grad_logits: Tensor, hidden: Tensor) -> None:
        """Set, or in the main gradient add, the rows of a block."""
        if self.is_main_gradient:
            import fused_weight_gradient_mlp_cuda  # from apex, only with gradient accumulation fusion

            fused_weight_gradient_mlp_cuda.wgrad_gemm_accum_fp32(hidden, grad_logits, self.target[block])
        else:
            torch.mm(grad_logits.t(), hidden, out=self.target[block])

    def for_autograd(self, num_valid: int) -> Tensor:
        """The gradient that autograd gets: zero if it is in the main gradient already (Megatron's convention)."""
        if self.is_main_gradient:
            self.weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]  # Megatron's mark
            return torch.zeros_like(self.weight)
        self.target[num_valid:] = 0
        return self.target


def _block_gradient(
    log_softmax: Tensor, columns: Tensor, upstream: Tensor, entropy: tuple[Tensor, Tensor] | None
) -> Tensor:
    """Gradient with respect to a block of logits, in the memory of `log_softmax`. A separate function, so that the
    temporaries of a block are freed before the next one.

    Args:
        log_softmax: [n, columns] fp32.
        columns: [n] int64, column of the target in this block; outside its bounds elsewhere.
        upstream: [n, 1], the gradient with respect to the log-probs, divided by the temperature.
        entropy: [n, 1] each: the entropy, and the gradient with respect to it divided by the temperature; None without
            an entropy gradient.
    """
    is_here = ((columns >= 0) & (columns < log_softmax.shape[1]))[:, None]
    if entropy is None:
        gradient = log_softmax.exp_().mul_(-upstream)
    else:
        softmax = log_softmax.exp()
        value, entropy_upstream = entropy
        # -p (upstream + entropy_upstream (log p + H))
        gradient = log_softmax.add_(value).mul_(entropy_upstream).add_(upstream).mul_(softmax.neg_())
    return gradient.scatter_add_(1, torch.where(is_here, columns[:, None], 0), upstream * is_here)


def _blocks(num_tokens: int, options: LogProbOptions) -> Iterator[slice]:
    """The columns of this rank that are real tokens, in blocks."""
    columns, num_valid = max(1, options.block_bytes // (4 * max(1, num_tokens))), options.shard.num_valid
    for start in range(0, num_valid, columns):
        yield slice(start, min(start + columns, num_valid))


def _scaled(logits: Tensor, options: LogProbOptions) -> Tensor:
    """New fp32 tensor of the same shape: logits divided by the temperature."""
    return logits.to(torch.float32, copy=True).div_(options.temperature)
