"""Stream a sharded model out as full HF tensors, in buckets of bounded size.

All ranks take part and all receive every tensor, in the same order, whatever the layout. A bucket is filled by one
pipeline stage, and if it holds experts by the processes that hold those: their shards travel as one flat tensor over
tensor parallelism, the merged tensors as one flat tensor to the other holders of experts and to the other stages. At
most about two buckets per rank are in memory at a time; under tensor parallelism four, with the shards of one and its
merged tensors.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor, nn

from megatron_dsrl.common.collective import gather
from megatron_dsrl.weights.table import TableEntry, WeightTable, bind


@dataclass(frozen=True)
class Owner:
    """Which processes of a model replica hold an entry."""

    stage: int
    """Pipeline rank."""
    expert_rank: int | None = None
    """Expert-parallel rank; None for what every one of them holds."""


@dataclass(frozen=True)
class PlannedBucket:
    """Entries that travel together, all held by the same processes."""

    owner: Owner
    entries: tuple[TableEntry, ...]


def plan_buckets(
    table: WeightTable, owner_of: Mapping[TableEntry, Owner], bucket_bytes: int, dtype: torch.dtype
) -> list[PlannedBucket]:
    """Cut the table's entries, in order, into buckets of at most `bucket_bytes`; a larger entry gets one of its own."""
    buckets: list[PlannedBucket] = []
    filled = 0
    for entry in table.entries():
        entry_bytes = sum(math.prod(tensor.shape) for tensor in entry.hf) * dtype.itemsize
        owner = owner_of[entry]
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
    """Yield all HF tensors of the model, bucket by bucket. Collective over the ranks of a model replica.

    Every rank must draw the generator to its end. Each bucket is memory of its own, not the parameters', and is
    freed when the caller lets go of it.

    Args:
        chunks: GPTModel chunks of this pipeline stage, in whatever wrappers.
        table: the model's weight table.
        bucket_bytes: size limit of a bucket in `dtype`; a single entry (QKV, gate and up, vocabulary) may exceed it.
        dtype: of the tensors that come out.

    Yields:
        (HF name, full tensor on the model's device), in the table's order.
    """
    bound = bind(chunks, table)
    device = next(parameter for parameters in bound.values() for parameter in parameters).device
    for bucket in plan_buckets(table, _owners(bound, table), bucket_bytes, dtype):
        shapes = [tensor.shape for entry in bucket.entries for tensor in entry.hf]
        if _holds(bucket.owner):
            flat = _gather_bucket([(entry, bound[entry][0]) for entry in bucket.entries], dtype)
        else:
            flat = torch.empty(sum(map(math.prod, shapes)), dtype=dtype, device=device)
        _broadcast_from(bucket.owner, flat)
        names = [tensor.name for entry in bucket.entries for tensor in entry.hf]
        parts = flat.split([math.prod(shape) for shape in shapes])
        yield [(name, part.view(shape)) for name, part, shape in zip(names, parts, shapes)]


def _owners(bound: Mapping[TableEntry, object], table: WeightTable) -> dict[TableEntry, Owner]:
    """The first pipeline stage that holds each entry, and of an expert's the expert-parallel rank that does."""
    order = list(table.entries())
    experts_per_rank = table.num_experts // parallel_state.get_expert_model_parallel_world_size()
    layers = {entry.layer for entry in bound}  # a stage has whole layers, whichever experts of them this rank has
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
    """Whether this process is among the owners."""
    expert_ranks = (None, parallel_state.get_expert_model_parallel_rank())
    return owner.stage == parallel_state.get_pipeline_model_parallel_rank() and owner.expert_rank in expert_ranks


def _gather_bucket(held: Sequence[tuple[TableEntry, nn.Parameter]], dtype: torch.dtype) -> Tensor:
    """All HF tensors of a bucket that this process holds a part of, flat, one after the other. Always a copy."""
    of_experts = held[0][0].rule.per_expert  # then all of the bucket are
    group = (
        parallel_state.get_expert_tensor_parallel_group()
        if of_experts
        else parallel_state.get_tensor_model_parallel_group()
    )
    if group.size() == 1:
        shards_of_rank = [[parameter.detach().to(dtype) for _, parameter in held]]
    else:
        local = torch.cat([parameter.detach().flatten().to(dtype) for _, parameter in held])
        ranks = [torch.empty_like(local) for _ in range(group.size())]
        dist.all_gather(ranks, local, group=group)
        shards_of_rank = [flat.split([parameter.numel() for _, parameter in held]) for flat in ranks]
    merged = []
    for (entry, parameter), shards in zip(held, zip(*shards_of_rank)):
        merged += entry.rule.layout.merge([shard.view(parameter.shape) for shard in shards])
    return torch.cat([tensor.flatten() for tensor in merged])


def _broadcast_from(owner: Owner, flat: Tensor) -> None:
    """First to the other expert-parallel processes of the stage, then to the other stages."""
    if owner.expert_rank is not None and owner.stage == parallel_state.get_pipeline_model_parallel_rank():
        _broadcast_within(parallel_state.get_expert_model_parallel_group(), owner.expert_rank, flat)
    _broadcast_within(parallel_state.get_pipeline_model_parallel_group(), owner.stage, flat)


def _broadcast_within(group: dist.ProcessGroup, rank: int, flat: Tensor) -> None:
    if group.size() > 1:
        dist.broadcast(flat, src=dist.get_global_rank(group, rank), group=group)
