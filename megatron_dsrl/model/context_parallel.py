"""Context parallelism: which tokens of a packed row each rank holds, and how what they compute becomes whole again.

Every sequence is cut into 2 * size chunks of equal length, of which rank r holds number r and number 2 * size - 1 - r
(zigzag): causal attention then costs every rank the same. It is the split that Megatron's RoPE and Transformer Engine's
attention expect of packed rows, so that one packing serves both layer implementations.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def zigzag_rows(lengths: Sequence[int], size: int, rank: int) -> Tensor:
    """Positions in the whole packed row of the tokens that a rank holds, in the order in which it holds them.

    Args:
        lengths: tokens of each sequence, multiples of 2 * size (of 1 where size is 1).
        size: context-parallel size.
        rank: context-parallel rank.

    Returns:
        [sum(lengths) / size] int64.
    """
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
    """The whole of something of which every rank has computed a part, on every rank.

    Every rank goes on to compute the same from it. So the gradient of a rank's part is the one that this rank gets for
    it, taken once, and not the sum over the ranks: a loss that all of them compute counts once.

    Args:
        local: [..., n] this rank's part, differentiable.
        places: [n] int64, where it belongs; the ranks' places are disjoint and cover the whole.
        total: size of the whole.
        group: context-parallel group; None for one rank, which has all parts, in whatever order.

    Returns:
        [..., total].
    """
    return _Assemble.apply(local, places, total, group)


class _Assemble(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor, places: Tensor, total: int, group: dist.ProcessGroup | None) -> Tensor:
        ctx.save_for_backward(places)
        whole = local.new_zeros(*local.shape[:-1], total).index_copy_(-1, places, local)
        if group is not None:
            dist.all_reduce(whole, group=group)
        return whole

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (places,) = ctx.saved_tensors
        return gradient.index_select(-1, places), None, None, None
