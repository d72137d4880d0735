"""Stream a sharded model as full HF tensors, in buckets of bounded size.

All ranks take part and receive every tensor, in the same order under every layout. A bucket is filled by one pipeline
stage or, if it contains experts, by the ranks that hold these. Their shards are gathered over tensor parallelism as one
flat tensor; the merged tensors are broadcast as one flat tensor to the other expert-parallel ranks and the other
stages. A model that is not split is not copied: its buckets are mostly views of the parameters. Otherwise about two
buckets per rank are in memory at a time; with tensor parallelism four, including the shards of a bucket. With LoRA the
stream has merged weights; each rank merges its shards, bucket by bucket.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor, nn

from megatron_dsrl.common.collective import gather
from megatron_dsrl.model.lora import adapters_by_weight
from megatron_dsrl.weights.load import bind
from megatron_dsrl.weights.table import TableEntry, WeightTable


@dataclass(frozen=True)
class Owner:
    """The ranks of a model replica that hold an entry."""

    stage: int
    """Pipeline rank."""
    expert_rank: int | None = None
    """Expert-parallel rank; None if every one holds it."""


@dataclass(frozen=True)
class PlannedBucket:
    """Entries that are sent together, all held by the same ranks."""

    owner: Owner
    entries: tuple[TableEntry, ...]


def plan_buckets(
    table: WeightTable, owners: Mapping[TableEntry, Owner], bucket_bytes: int, dtype: torch.dtype
) -> list[PlannedBucket]:
    """Split the table's entries, in order, into buckets of at most `bucket_bytes`; a larger entry gets its own
    bucket."""
    buckets: list[PlannedBucket] = []
    filled = 0
    for entry in table.entries():
        entry_bytes = sum(math.prod(tensor.shape) for tensor in entry.hf) * dtype.itemsize
        owner = owners[entry]
        if not buckets or buckets[-1].owner != owner or filled + entry_bytes > bucket_bytes:
            buckets.append(PlannedBucket(owner, ()))
            filled = 0
        buckets[-1] = PlannedBucket(owner, (*buckets[-1].entries, entry))
        filled += entry_bytes
    return buckets


@torch.no_grad()
def stream_hf_weights(
    chunks: Sequence[nn.Module], table: WeightTable, bucket_bytes: int, dtype: torch.dtype
) -> Iterator[list[tuple[str, Tensor]]]:
    """Yield all HF tensors of the model, bucket by bucket: (HF name, full tensor on the model's device), in the table's
    order. Collective over the ranks of a model replica.

    Every rank must exhaust the generator. Tensors may be views of the parameters: copy what you keep, and do not write
    to them. Weights with a LoRA adapter are merged with it; the parameters stay as they are.

    Args:
        chunks: GPTModel chunks of this pipeline stage, wrapped or not.
        bucket_bytes: maximum size of a bucket in `dtype`; a single entry (QKV, gate and up, vocabulary) may exceed it.
    """
    bound, adapters = bind(chunks, table), adapters_by_weight(chunks)

    def current(parameter: nn.Parameter) -> Tensor:
        """The parameter, or its weight merged with the adapter."""
        return adapters[parameter].merged(parameter) if parameter in adapters else parameter.detach()

    device = next(parameter for parameters in bound.values() for parameter in parameters).device
    for bucket in plan_buckets(table, _owners(bound, table), bucket_bytes, dtype):
        tensors = [tensor for entry in bucket.entries for tensor in entry.hf]
        names, shapes = [tensor.name for tensor in tensors], [tensor.shape for tensor in tensors]
        merged: list[Tensor] = []
        if _holds(bucket.owner):
            merged = _gather_bucket([(entry, current(bound[entry][0])) for entry in bucket.entries], dtype)
        if not _is_broadcast(bucket.owner):
            yield list(zip(names, merged, strict=True))
            continue
        if merged:
            flat = torch.cat([tensor.flatten() for tensor in merged])
        else:
            flat = torch.empty(sum(map(math.prod, shapes)), dtype=dtype, device=device)
        _broadcast_from(bucket.owner, flat)
        parts = flat.split([math.prod(shape) for shape in shapes])
        yield [(name, part.view(shape)) for name, part, shape in zip(names, parts, shapes)]


def _owners(bound: Mapping[TableEntry, object], table: WeightTable) -> dict[TableEntry, Owner]:
    """The first pipeline stage that holds each entry and, for entries of experts, the expert-parallel rank."""
    order = list(table.entries())
    experts_per_rank = table.num_experts // parallel_state.get_expert_model_parallel_world_size()
    layers = {entry.layer for entry in bound}  # a stage holds whole layers, though this rank may hold only some experts
    mine = [entry in bound if entry.layer is None else entry.layer in layers for entry in order]
    group = parallel_state.get_pipeline_model_parallel_group()
    held = gather(mine, group)
    return {
        entry: Owner(
            stage=[stage[i] for stage in held].index(True),
            expert_rank=None if entry.expert is None else entry.expert // experts_per_rank,
        )
        for i, entry in enumerate(order)
    }


def _holds(owner: Owner) -> bool:
    """Whether this rank is an owner."""
    expert_ranks = (None, parallel_state.get_expert_model_parallel_rank())
    return owner.stage == parallel_state.get_pipeline_model_parallel_rank() and owner.expert_rank in expert_ranks


def _gather_bucket(held: Sequence[tuple[TableEntry, Tensor]], dtype: torch.dtype) -> list[Tensor]:
    """All HF tensors of a bucket, from this rank's and the other ranks' shards of its entries; views if possible."""
    are_experts = held[0][0].rule.per_expert  # the same for all entries of a bucket
    group = (
        parallel_state.get_expert_tensor_parallel_group()
        if are_experts
        else parallel_state.get_tensor_model_parallel_group()
    )
    if group.size() == 1:
        rank_shards: list[Sequence[Tensor]] = [[shard.to(dtype) for _, shard in held]]
    else:
        local = torch.cat([shard.flatten().to(dtype) for _, shard in held])
        ranks = [torch.empty_like(local) for _ in range(group.size())]
        dist.all_gather(ranks, local, group=group)
        rank_shards = [flat.split([shard.numel() for _, shard in held]) for flat in ranks]
    merged: list[Tensor] = []
    for (entry, own), shards in zip(held, zip(*rank_shards)):
        merged += entry.rule.layout.merge([shard.view(own.shape) for shard in shards])
    return merged


def _is_broadcast(owner: Owner) -> bool:
    """Whether ranks other than the owners need the bucket; the same on every rank."""
    experts = parallel_state.get_expert_model_parallel_world_size() if owner.expert_rank is not None else 1
    return experts * parallel_state.get_pipeline_model_parallel_world_size() > 1


def _broadcast_from(owner: Owner, flat: Tensor) -> None:
    """Broadcast to the other expert-parallel ranks of the stage, then to the other stages."""
    if owner.expert_rank is not None and owner.stage == parallel_state.get_pipeline_model_parallel_rank():
        _broadcast_within(parallel_state.get_expert_model_parallel_group(), owner.expert_rank, flat)
    _broadcast_within(parallel_state.get_pipeline_model_parallel_group(), owner.stage, flat)


def _broadcast_within(group: dist.ProcessGroup, rank: int, flat: Tensor) -> None:
    if group.size() > 1:
        dist.broadcast(flat, src=dist.get_global_rank(group, rank), group=group)
