"""Comparison of the gradients of log P(y) and log P(y|x) of one response: the alignment of the two spaces in
arXiv 2604.14142.

For each response the model makes two forward and backward passes, over the scored sequence of each space. The first
gradient is copied out of the gradient buffers, the second one stays there: at most two gradients exist, in fp32, and no
optimizer.

Inner products are over the whole model, every parameter once. Gradients are those of training, reduced by Megatron over
all kinds of parallelism; parameters that several ranks replicate (norms under tensor parallelism, the embedding shared
with the last pipeline stage, everything under context and data parallelism) are counted on one of them. Products are
summed in fp64.

Data-parallel replicas take part, because expert parallelism needs them, but do not divide the work.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.layers import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared
from torch import Tensor, nn

from megatron_dsrl.actor.forward_backward import MicroBatch
from megatron_dsrl.actor.log_probs import LogProbOptions, VocabularyShard, log_probs_and_entropy
from megatron_dsrl.actor.packing import PackedRow
from megatron_dsrl.actor.sharded_model import ShardedModel
from megatron_dsrl.algorithms.spaces import ScoredSequence
from megatron_dsrl.common.collective import gather
from megatron_dsrl.model.output_rows import FactoredLogits

_PRODUCT_ELEMENTS = 2**22
"""Elements that are converted to fp64 at a time."""


@dataclass(frozen=True)
class TokenScores:
    """The model's scores of a sequence's scored tokens, on the CPU."""

    log_probs: Tensor
    """[num_scored] float32. Unit: nats."""
    entropy: Tensor
    """[num_scored] float32, entropy of the distribution that each token is drawn from. Unit: nats."""


@dataclass(frozen=True)
class GradientComparison:
    """The two gradients of one response compared; the same on every rank."""

    without_prompt: TokenScores
    """In the pre-train space."""
    with_prompt: TokenScores
    """In the post-train space."""
    inner_product: float
    """<grad log P(y), grad log P(y|x)>, log P summed over the scored tokens."""
    norm_without_prompt: float
    norm_with_prompt: float

    @property
    def cosine(self) -> float | None:
        """Cosine of the angle between the two gradients; None if one of them is zero."""
        product_of_norms = self.norm_without_prompt * self.norm_with_prompt
        return self.inner_product / product_of_norms if product_of_norms > 0 else None


class LogProbGradients:
    """A sharded model, with memory for a second gradient. Every method is collective over the ranks."""

    def __init__(self, model: ShardedModel, vocab_size: int, temperature: float) -> None:
        """
        Args:
            model: built without the distributed optimizer, which would shard gradients.
            vocab_size: rows of the HF embedding.
        """
        self._model = model
        self._vocab_size = vocab_size
        self._temperature = temperature
        self._counted = [p for chunk in model.chunks for p in chunk.parameters() if _is_counted_here(p)]
        self._copies = [torch.empty_like(parameter.main_grad) for parameter in self._counted]

    def compare(self, without_prompt: ScoredSequence, with_prompt: ScoredSequence) -> GradientComparison:
        """Compare the two gradients of one response. Raises FloatingPointError if a gradient is not finite."""
        tokens_without = self._backward(without_prompt)
        for parameter, copy in zip(self._counted, self._copies):
            copy.copy_(parameter.main_grad)
        tokens_with = self._backward(with_prompt)
        inner_product, square_without, square_with = self._products()
        if not math.isfinite(inner_product + square_without + square_with):
            raise FloatingPointError("a gradient of a response's log-prob is not finite")
        return GradientComparison(
            without_prompt=tokens_without,
            with_prompt=tokens_with,
            inner_product=inner_product,
            norm_without_prompt=math.sqrt(square_without),
            norm_with_prompt=math.sqrt(square_with),
        )

    def _backward(self, sequence: ScoredSequence) -> TokenScores:
        """Leave the gradient of the sum of the scored tokens' log-probs in the gradient buffers."""
        rows = self._model.pack_share([sequence])
        kept = self._model.accumulate_gradients([MicroBatch(row, partial(self._score, row)) for row in rows])
        tokens = next((tokens for tokens in kept if tokens is not None), None)
        # Only the last pipeline stage of the replica that got the row has scores; it shares them with all ranks.
        return next(tokens for tokens in gather(tokens) if tokens is not None)

    def _score(self, row: PackedRow, logits: FactoredLogits) -> tuple[Tensor, TokenScores | None]:
        log_probs, entropy = scores_of_row(row, logits, self._vocab_size, self._temperature)
        tokens = TokenScores(log_probs.detach().cpu(), entropy.detach().cpu()) if row.indices else None
        return log_probs.sum(), tokens

    @torch.no_grad()
    def _products(self) -> tuple[float, float, float]:
        """<copy, buffer>, |copy|^2 and |buffer|^2 over all parameters of the model."""
        dense = torch.zeros(3, dtype=torch.float64, device=self._model.device)
        experts = torch.zeros_like(dense)
        for parameter, first in zip(self._counted, self._copies):
            second = parameter.main_grad
            products = torch.stack([_dot(first, second), _dot(first, first), _dot(second, second)])
            # Megatron marks the parameters of experts, which are reduced over other groups
            (dense if getattr(parameter, "allreduce", True) else experts).add_(products)
        dist.all_reduce(dense, group=parallel_state.get_model_parallel_group())
        dist.all_reduce(experts, group=parallel_state.get_expert_tensor_model_pipeline_parallel_group())
        inner_product, square_of_first, square_of_second = (dense + experts).tolist()
        return inner_product, square_of_first, square_of_second


def scores_of_row(row: PackedRow, logits: FactoredLogits, vocab_size: int, temperature: float) -> Tensor:
    """Log-probs and entropy of a row's scored tokens: [2, sum(num_scored)] float32. The logits are [S, columns of this
    rank], at the positions that predict the scored tokens."""
    options = LogProbOptions(VocabularyShard.for_this_rank(len(logits.weight), vocab_size), temperature)
    return row.assemble(torch.stack(log_probs_and_entropy(logits, row.targets, options)))


def _is_counted_here(parameter: nn.Parameter) -> bool:
    """Whether this rank counts the parameter (or its shard), among the ranks that replicate it."""
    if not parameter.requires_grad or not param_is_not_shared(parameter):
        return False
    experts = parallel_state.get_expert_tensor_parallel_group()
    return param_is_not_tensor_parallel_duplicate(parameter, expert_tp_group=experts)


def _dot(one: Tensor, other: Tensor) -> Tensor:
    """Inner product in fp64."""
    parts = _parts(one.flatten(), other.flatten())
    return torch.stack([a.double() @ b.double() for a, b in parts]).sum()


def _parts(one: Tensor, other: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    yield from zip(one.split(_PRODUCT_ELEMENTS), other.split(_PRODUCT_ELEMENTS))
