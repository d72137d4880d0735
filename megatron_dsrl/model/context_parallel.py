"""Context parallelism: which tokens of a packed row each rank holds, and how results are assembled.

Every sequence is cut into 2 * size chunks of equal length; rank r holds chunks r and 2 * size - 1 - r (zigzag), so that
causal attention costs every rank the same. Megatron's RoPE and Transformer Engine's attention expect this split of
packed rows, so one packing works for both layer implementations.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def zigzag_rows(lengths: Sequence[int], size: int, rank: int) -> Tensor:
    """Positions in the whole packed row of the tokens that a rank holds, in the rank's order: [sum(lengths) / size]
    int64. The lengths are multiples of 2 * size unless the context-parallel size is 1."""
    if size == 1:
        return torch.arange(sum(lengths))
    assert all(length % (2 * size) == 0 for length in lengths), "sequences must be padded to a multiple of 2 * size"
    pieces, start = [torch.zeros(0, dtype=torch.int64)], 0
    for length in lengths:
        chunk = length // (2 * size)
        for number in (rank, 2 * size - 1 - rank):
            pieces.append(torch.arange(start + number * chunk, start + (number + 1) * chunk))
        start += length
    return torch.cat(pieces)


def assemble(local: Tensor, places: Tensor, total: int, group: dist.ProcessGroup | None) -> Tensor:
    """Assemble a tensor [..., total] from the parts that the ranks computed, on every rank.

    All ranks then compute the same from it. Therefore the gradient of a rank's part is this rank's own gradient and not
    the sum over ranks: a loss that all ranks compute counts once.

    Args:
        local: [..., n] this rank's part, differentiable.
        places: [n] int64, positions of the part; those of all ranks are disjoint and cover 0 to total - 1.
        group: context-parallel group; None for a single rank that holds all parts, in any order.
    """
    return _Assemble.apply(local, places, total, group)


class _Assemble(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor, places: Tensor, total: int, group: dist.ProcessGroup | None) -> Tensor:
        """All-reduce of the parts, each at its places."""
        ctx.save_for_backward(places)
        whole = local.new_zeros(*local.shape[:-1], total).index_copy_(-1, places, local)
        if group is not None:
            dist.all_reduce(whole, group=group)
        return whole

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        """This rank's part of its own gradient, without communication."""
        (places,) = ctx.saved_tensors
        return gradient.index_select(-1, places), None, None, None
