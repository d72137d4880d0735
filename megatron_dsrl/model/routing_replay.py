"""Routing replay: a mixture of experts routes tokens to given experts.

The router still computes the weights of the given experts, with gradients; only the choice is given (rollout routing
replay, R3, arXiv 2510.11370). A packed row without given experts is routed as usual.

Megatron-core's `RouterReplay` takes the choices of a forward pass from a global list, in the order in which layers were
built, and those of recomputation from another list. Here they are part of the packed row, in its `packed_seq_params`,
which every layer receives in the forward pass and in recomputation. Therefore pipeline schedules may interleave rows.
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
    None lets the routers choose."""


def experts_of_this_rank(routed_experts: Tensor, config: TransformerConfig) -> Tensor:
    """Select the tokens that this rank routes from its context-parallel part of the row.

    Under sequence parallelism tensor-parallel ranks route consecutive parts; otherwise each routes the whole part.
    """
    if not config.sequence_parallel:
        return routed_experts
    size, rank = config.tensor_model_parallel_size, parallel_state.get_tensor_model_parallel_rank()
    return routed_experts.chunk(size)[rank]


class GivenExperts:
    """Takes the place of `RouterReplay` in Megatron's routers."""

    def __init__(self) -> None:
        self.experts: Tensor | None = None
        """[tokens, experts per token] int64; None lets the router choose."""

    def get_replay_topk(
        self,
        scores: Tensor,
        topk: int,
        num_groups: int | None,
        group_topk: int | None,
        default_compute_topk: Callable[..., tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, Tensor]:
        """Scores and indices of the experts to use, both [tokens, topk]; called by Megatron's router."""
        if self.experts is None:
            return default_compute_topk(scores, topk, num_groups=num_groups, group_topk=group_topk)
        return scores.gather(1, self.experts), self.experts


class RoutedTransformerLayer(TransformerLayer):
    """A layer with experts that follows the routing given with a packed row, if any."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._given = GivenExperts()
        self.mlp.router.router_replay = self._given

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        routed_experts = getattr(kwargs.get("packed_seq_params"), "routed_experts", None)
        if routed_experts is None:
            self._given.experts = None
        else:
            self._given.experts = routed_experts[:, self.layer_number - 1].to(torch.int64)
        return super().forward(*args, **kwargs)
