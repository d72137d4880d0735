"""Megatron's forward-backward schedule over packed micro-batches."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import scatter_to_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_dsrl.actor.packing import PackedRow
from megatron_dsrl.model.build import bare_model
from megatron_dsrl.model.output_rows import output_at_rows
from megatron_dsrl.model.routing_replay import RoutedPackedSeqParams, experts_of_this_rank

Result = TypeVar("Result")


@dataclass(frozen=True)
class MicroBatch(Generic[Result]):
    """A packed row, and the function that scores the model's output for it."""

    row: PackedRow
    score: Callable[[Any], tuple[Tensor, Result]]
    """Called on the last pipeline stage with the output at the row's predicting positions, `FactoredLogits` of a policy
    and [S, 1] of a value model; returns the loss (scalar, summed into the total) and a result to keep. Under context
    parallelism every rank returns the loss of the whole row; see `PackedRow.assemble`."""


def run_schedule(
    chunks: Sequence[MegatronModule],
    micro_batches: Sequence[MicroBatch[Result]],
    forward_only: bool = False,
) -> list[Result]:
    """Run all micro-batches through this rank's pipeline stage; gradients accumulate in the model's gradient buffers.

    The loss is *summed* over micro-batches and data-parallel ranks, never averaged: its weights already include the
    global denominator. Therefore the model must be built with `calculate_per_token_loss` (no averaging by Megatron) and
    use `sum_gradients` as its `finalize_model_grads_func`.

    There is at least one micro-batch, and their order is the same on all ranks of a model replica. With several chunks
    the number of micro-batches is a multiple of the pipeline-parallel size. Returns, on the last stage, the result that
    each micro-batch's `score` keeps; on the other stages nothing.
    """
    iterators = [iter(micro_batches) for _ in chunks]
    interleaved = len(chunks) > 1
    return get_forward_backward_func()(
        forward_step_func=_forward_step,
        data_iterator=iterators if interleaved else iterators[0],
        model=list(chunks) if interleaved else chunks[0],
        num_microbatches=len(micro_batches),
        seq_length=max(micro_batch.row.token_ids.shape[1] for micro_batch in micro_batches),  # required but unused here
        micro_batch_size=1,
        forward_only=forward_only,
    )


def _forward_step(
    iterator: Iterator[MicroBatch[Result]], chunk: MegatronModule
) -> tuple[Any, Callable[[Any], tuple[Tensor, Tensor, Result]]]:
    """Run the next micro-batch through a model chunk, as Megatron's schedules call it.

    Returns the output and the function that turns it into loss, token count and result."""
    micro_batch = next(iterator)
    row = micro_batch.row
    output = chunk(
        row.token_ids,
        row.position_ids,
        None,
        packed_seq_params=_packed(row, chunk.config),
        padding_mask=_padding_mask(row, chunk),
        output_processor=output_at_rows,
        output_processor_context=row.predicting_positions,
    )
    return output, partial(_compute_loss, micro_batch)


def _compute_loss(micro_batch: MicroBatch[Result], output: Any) -> tuple[Tensor, Tensor, Result]:
    loss, kept = micro_batch.score(output)
    return loss, torch.zeros([], dtype=torch.int, device=loss.device), kept


def sum_gradients(model: list[torch.nn.Module], num_tokens: Tensor | None = None, **options: object) -> None:
    """Megatron's gradient reduction over all kinds of parallelism, without its division by tokens."""
    finalize_model_grads(model, None, **options)


def _packed(row: PackedRow, config: TransformerConfig) -> RoutedPackedSeqParams:
    experts = None
    if row.routed_experts is not None:
        experts = experts_of_this_rank(row.routed_experts, config).to(row.token_ids.device)
    return RoutedPackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=row.sequence_starts,
        cu_seqlens_kv=row.sequence_starts,
        max_seqlen_q=row.longest,
        max_seqlen_kv=row.longest,
        routed_experts=experts,
    )


def _padding_mask(row: PackedRow, chunk: MegatronModule) -> Tensor | None:
    """Padding mask for the MoE routers, [1, T] or this rank's part of it; nothing else uses it."""
    if not chunk.config.num_moe_experts:
        return None
    if chunk.config.sequence_parallel and not bare_model(chunk).pre_process:  # on the first stage Megatron splits it
        return scatter_to_sequence_parallel_region(row.is_padding.T.contiguous()).T
    return row.is_padding
