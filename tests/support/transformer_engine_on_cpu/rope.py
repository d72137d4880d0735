"""Transformer Engine's fused rotary embedding for packed rows in PyTorch."""

from typing import Any

import torch
from torch import Tensor

__all__ = ["fused_rope_backward", "fused_rope_forward"]

THD = 2
"""Value of `NVTE_QKV_Format.NVTE_THD`."""


def fused_rope_forward(
    t: Tensor,
    freqs: Tensor,
    start_positions: Tensor | None,
    tensor_format: int,
    interleaved: bool,
    cu_seqlens: Tensor | None,
    cp_size: int,
    cp_rank: int,
    direction: int = 1,
) -> Tensor:
    """Rotate the heads of [t, heads, d] packed tokens.

    Args:
        freqs: [longest sequence, 1, 1, d] angles in float32.
        cu_seqlens: [sequences + 1] boundaries of the whole sequences; this rank has 1 / `cp_size` of each.
        direction: -1 rotates back. Transformer Engine's function does not have it.
    """
    assert int(tensor_format) == THD and cu_seqlens is not None and start_positions is None and not interleaved
    assert freqs.dtype == torch.float32 and freqs.shape[-1] == t.shape[-1]
    lengths = (cu_seqlens.diff() // cp_size).tolist()
    assert sum(lengths) == len(t)
    places = torch.cat([_positions(length, cp_size, cp_rank) for length in lengths])
    angles = freqs[places, 0] * direction
    first, second = t.float().chunk(2, dim=-1)
    return (t.float() * angles.cos() + torch.cat([-second, first], dim=-1) * angles.sin()).to(t.dtype)


def fused_rope_backward(grad: Tensor, *arguments: Any) -> Tensor:
    """Gradient of `fused_rope_forward`, whose arguments follow the tensor: the rotation back."""
    return fused_rope_forward(grad, *arguments, direction=-1)


def _positions(length: int, cp_size: int, cp_rank: int) -> Tensor:
    """Positions in the sequence of a rank's tokens: the chunks `cp_rank` and `2 * cp_size - 1 - cp_rank` of it."""
    if cp_size == 1:
        return torch.arange(length)
    half = length // 2
    last = 2 * cp_size - 1 - cp_rank
    return torch.cat([torch.arange(cp_rank * half, (cp_rank + 1) * half), torch.arange(last * half, (last + 1) * half)])
