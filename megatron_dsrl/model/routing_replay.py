"""Routing replay: a mixture of experts sends its tokens to the experts that are named for them.

What the router computes still decides how much each of the named experts counts, and has a gradient; only which ones
they are is given (rollout routing replay, R3, arXiv 2510.11370). A packed row that names none is routed as usual.

Departure from Megatron-core's own `RouterReplay`, which takes the choices of a forward pass from a global list, in the
order in which layers were built, and those of recomputation from another: here they travel with the packed row, in its
`packed_seq_params`, which every layer gets in the forward pass and again when it is recomputed. So pipeline schedules
may interleave rows as they like.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor


@dataclass
class RoutedPackedSeqParams(PackedSeqParams):
    """A packed row with the experts of its tokens."""

    routed_experts: Tensor | None = None
    """[tokens of the row that this rank routes, layers of the whole model, experts per token] integers, on the device;
    None where the routers choose."""


def experts_of_this_rank(routed_experts: Tensor, config: TransformerConfig) -> Tensor:
    """The part for the tokens that this rank routes, of those of its context-parallel part of the row.

    Under sequence parallelism tensor-parallel ranks route consecutive parts of the row; otherwise all route all of it.
    """
    if not config.sequence_parallel:
        return routed_experts
    size, rank = config.tensor_model_parallel_size, parallel_state.get_tensor_model_parallel_rank()
    return routed_experts.chunk(size)[rank]


class GivenExperts:
    """Stands where Megatron's routers have a `RouterReplay`."""

    def __init__(self) -> None:
        self.experts: Tensor | None = None
        """int64 [tokens, experts per token]; None lets the router choose."""

    def get_replay_topk(
        self,
        scores: Tensor,
        topk: int,
        num_groups: int | None,
        group_topk: int | None,
        default_compute_topk: Callable[..., tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, Tensor]:
        """Scores and numbers, both [tokens, topk], of the experts to use; called by Megatron's router."""
        if self.experts is None:
            return default_compute_topk(scores, topk, num_groups=num_groups, group_topk=group_topk)
        return scores.gather(1, self.experts), self.experts


class RoutedTransformerLayer(TransformerLayer):
    """A layer with experts that follows the routing of a packed row, if it has one."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._given = GivenExperts()
        self.mlp.router.router_replay = self._given

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """As `TransformerLayer.forward`."""
        routed_experts = getattr(kwargs.get("packed_seq_params"), "routed_experts", None)
        if routed_experts is None:
            self._given.experts = None
        else:
            self._given.experts = routed_experts[:, self.layer_number - 1].to(torch.int64)
        return super().forward(*args, **kwargs)
