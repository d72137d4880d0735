"""A sharded Megatron model without an optimizer: it scores sequences and accumulates gradients.

Every method is collective over the ranks.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_dsrl.actor.forward_backward import MicroBatch, Result, run_schedule, sum_gradients
from megatron_dsrl.actor.micro_batch_plan import SequenceCost, plan_micro_batches
from megatron_dsrl.actor.packing import PackedRow, RoutedExperts, RowSplit, pack
from megatron_dsrl.algorithms.experience import PerToken
from megatron_dsrl.algorithms.spaces import ScoredSequence
from megatron_dsrl.common.collective import gather


class ShardedModel:
    """This rank's part of a model, wrapped for data parallelism."""

    def __init__(self, chunks: list[DistributedDataParallel], max_tokens_per_micro_batch: int) -> None:
        """`chunks` are this pipeline stage's, weights loaded."""
        self.chunks = chunks
        self.config = chunks[0].config
        self.config.finalize_model_grads_func = sum_gradients  # the loss weights already include the token count
        self.device = next(chunks[0].parameters()).device
        self._max_tokens = max_tokens_per_micro_batch

    def pack_share(
        self, sequences: Sequence[ScoredSequence], routed_experts: Sequence[str] | None = None
    ) -> list[PackedRow]:
        """This data-parallel rank's share of the batch as packed rows; every rank gets the same number of rows.

        The batch is the same on every rank; for `routed_experts` see `Experience.routed_experts`.
        """
        split = RowSplit(
            context_parallel_size=parallel_state.get_context_parallel_world_size(),
            context_parallel_rank=parallel_state.get_context_parallel_rank(),
            sequence_parallel_size=self.config.tensor_model_parallel_size if self.config.sequence_parallel else 1,
        )
        plan = plan_micro_batches(
            [split.padded(len(sequence.token_ids)) for sequence in sequences],
            parallel_state.get_data_parallel_world_size(),
            self._max_tokens,
            _sequence_cost(self.config),
            multiple_of=self.config.pipeline_model_parallel_size if len(self.chunks) > 1 else 1,
        )[parallel_state.get_data_parallel_rank()]
        experts = None
        if routed_experts is not None:
            experts = RoutedExperts(routed_experts, self.config.num_layers, self.config.moe_router_topk)
        return [pack(sequences, indices, split, self.device, experts) for indices in plan]

    def accumulate_gradients(self, micro_batches: Sequence[MicroBatch[Result]]) -> list[Result]:
        """Clear gradients, then run forward and backward; returns the kept results (last stage only)."""
        for chunk in self.chunks:
            chunk.train()
            chunk.zero_grad_buffer()
        return run_schedule(self.chunks, micro_batches)

    @torch.no_grad()
    def score_tokens(
        self,
        sequences: Sequence[ScoredSequence],
        score: Callable[[PackedRow, Any], Tensor],
        routed_experts: Sequence[str] | None = None,
    ) -> PerToken:
        """Compute one number per scored token with a forward pass over the whole batch. Returns [num_scored] per
        sequence, the same on every rank.

        Args:
            score: maps a packed row and the model's output at its predicting positions (see `MicroBatch.score`) to
                [sum(num_scored)] float32, the same on all ranks that hold shards of that row or output (see
                `PackedRow.assemble`).
        """
        for chunk in self.chunks:
            chunk.eval()
        rows = self.pack_share(sequences, routed_experts)
        micro_batches = [MicroBatch(row, _per_sequence(row, score)) for row in rows]
        kept = run_schedule(self.chunks, micro_batches, forward_only=True)
        mine = dict(pair for pairs in kept for pair in pairs)
        others_have_the_same = (
            parallel_state.get_tensor_model_parallel_rank() > 0 or parallel_state.get_context_parallel_rank() > 0
        )
        everyone = gather({} if others_have_the_same else mine)
        by_index = {i: values for part in everyone for i, values in part.items()}
        return tuple(by_index[i] for i in range(len(sequences)))


def _sequence_cost(config: TransformerConfig) -> SequenceCost:
    experts_per_token = config.moe_router_topk if config.num_moe_experts else 0
    feed_forward = experts_per_token * config.moe_ffn_hidden_size if experts_per_token else config.ffn_hidden_size
    return SequenceCost.for_layer(
        hidden_size=config.hidden_size,
        attention_heads=config.num_attention_heads,
        key_value_groups=config.num_query_groups,
        head_dim=config.kv_channels,
        feed_forward_size=feed_forward,
    )


def _per_sequence(
    row: PackedRow, score: Callable[[PackedRow, Any], Tensor]
) -> Callable[[Any], tuple[Tensor, list[tuple[int, Tensor]]]]:
    """Wrap `score` to keep a list of (index of the sequence, its scores)."""

    def split(output: Any) -> tuple[Tensor, list[tuple[int, Tensor]]]:
        scores = score(row, output)
        parts = scores.cpu().split(row.num_scored)
        return scores.sum(), [(i, part.clone()) for i, part in zip(row.indices, parts)]

    return split
