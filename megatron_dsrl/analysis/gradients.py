"""Gradients of log P(y) and log P(y|x) of one response, compared: arXiv 2604.14142, the alignment of the two spaces.

For each response the model makes two passes forward and backward, over the scored sequence of either space. The first
gradient is moved out of the gradient buffers into one copy, the second one stays in the buffers: two gradients exist,
in fp32, never more, and no optimizer.

Inner products are over the whole model, every parameter once. Gradients are those that training would see, reduced by
Megatron over all kinds of parallelism; what several ranks hold alike (norms under tensor parallelism, the embedding
that the last pipeline stage shares, everything under context and data parallelism) is counted on one of them. Products
are summed in fp64.

Data-parallel replicas take part, as expert parallelism needs them to, but do not share out the work.
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
from megatron_dsrl.actor.log_probs import VocabularyShard, log_probs_and_entropy
from megatron_dsrl.actor.packing import PackedRow
from megatron_dsrl.actor.sharded_model import ShardedModel
from megatron_dsrl.algorithms.spaces import ScoredSequence
from megatron_dsrl.common.collective import gather

_PRODUCT_ELEMENTS = 2**22
"""Elements that are turned into fp64 at a time."""


@dataclass(frozen=True)
class TokenScores:
    """What the model says of a sequence's scored tokens; on the CPU."""

    log_probs: Tensor
    """[num_scored] float32."""
    entropy: Tensor
    """[num_scored] float32, of the distribution that each token is drawn from; nat."""


@dataclass(frozen=True)
class GradientComparison:
    """Of one response, the same on every rank."""

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
        """Of the angle between the two gradients; None where one of them is zero."""
        product_of_norms = self.norm_without_prompt * self.norm_with_prompt
        return self.inner_product / product_of_norms if product_of_norms > 0 else None


class LogProbGradients:
    """A sharded model, and room for one gradient besides its own. Every method is collective over the ranks."""

    def __init__(self, model: ShardedModel, vocab_size: int, temperature: float):
        """
        Args:
            model: built without the distributed optimizer, whose gradients are sharded.
            vocab_size: rows of the HF embedding.
            temperature: by which logits are divided.
        """
        self._model = model
        self._vocab_size = vocab_size
        self._temperature = temperature
        self._counted = [p for chunk in model.chunks for p in chunk.parameters() if _is_counted_here(p)]
        self._copies = [torch.empty_like(parameter.main_grad) for parameter in self._counted]

    def compare(self, without_prompt: ScoredSequence, with_prompt: ScoredSequence) -> GradientComparison:
        """Both gradients of one response.

        Args:
            without_prompt: the response in the pre-train space.
            with_prompt: the same response in the post-train space.

        Raises:
            FloatingPointError: a gradient is not finite.
        """
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
        # Only the last pipeline stage scores, and only the replica that got the row; all others learn of it.
        return next(tokens for tokens in gather(tokens) if tokens is not None)

    def _score(self, row: PackedRow, logits: Tensor) -> tuple[Tensor, TokenScores | None]:
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
            (dense if _is_dense(parameter) else experts).add_(products)
        dist.all_reduce(dense, group=parallel_state.get_model_parallel_group())
        dist.all_reduce(experts, group=parallel_state.get_expert_tensor_model_pipeline_parallel_group())
        inner_product, square_of_first, square_of_second = (dense + experts).tolist()
        return inner_product, square_of_first, square_of_second


def scores_of_row(row: PackedRow, logits: Tensor, vocab_size: int, temperature: float) -> Tensor:
    """Log-probs and entropy of a row's scored tokens: [2, sum(num_scored)] float32.

    Args:
        row: whose tokens are scored.
        logits: [S, columns of this rank] at the positions that predict them.
        vocab_size: rows of the HF embedding.
        temperature: by which logits are divided.
    """
    shard = VocabularyShard.for_this_rank(logits.shape[-1], vocab_size)
    return row.assemble(torch.stack(log_probs_and_entropy(logits, row.targets, temperature, shard)))


def _is_dense(parameter: nn.Parameter) -> bool:
    """Whether it is no expert's. Megatron marks experts' parameters: they are reduced over groups of their own."""
    return getattr(parameter, "allreduce", True)


def _is_counted_here(parameter: nn.Parameter) -> bool:
    """Whether this rank is the one, of those that hold the parameter (or part of it) alike, that counts it."""
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
