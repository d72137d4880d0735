"""Transformer Engine's kernels for ring attention over packed rows in PyTorch.

A rank has two chunks of every sequence, one after the other: the halves of its rows of that sequence. `cu_seqlens` are
the boundaries of these rows. Statistics of all rows are packed: [heads, t] in float32.
"""

import torch
from torch import Tensor

__all__ = [
    "thd_grad_correction",
    "thd_out_correction",
    "thd_read_half_tensor",
    "thd_read_second_half_lse",
    "thd_second_half_lse_correction",
]


def thd_read_half_tensor(tensor: Tensor, cu_seqlens: Tensor, half: int) -> Tensor:
    """The first or second half of every sequence of [t, heads, d], or of [2, t, heads, d]."""
    return tensor.index_select(tensor.dim() - 3, _half(cu_seqlens, half))


def thd_second_half_lse_correction(lse: Tensor, step: Tensor, cu_seqlens: Tensor, packed: bool) -> None:
    """Add a step's statistics of the second halves to those of all rows, in place."""
    assert packed
    rows = _half(cu_seqlens, 1)
    lse[:, rows] = torch.logaddexp(lse[:, rows], step[:, : len(rows)].to(lse.dtype))


def thd_read_second_half_lse(lse: Tensor, cu_seqlens: Tensor, packed: bool, length: int) -> Tensor:
    """[heads, length] statistics of the second halves; zeros after them."""
    assert packed
    rows = _half(cu_seqlens, 1)
    half = lse.new_zeros(len(lse), length)
    half[:, : len(rows)] = lse[:, rows]
    return half


def thd_out_correction(
    out: Tensor,
    step: Tensor,
    old_lse: Tensor,
    lse: Tensor,
    lse_step: Tensor,
    cu_seqlens: Tensor,
    only_second_half: bool,
    packed: bool,
) -> None:
    """Rescale the output so far to the statistics of all steps and add a step's output, in place.

    Args:
        out: [t, heads, d], or such rows in one.
        old_lse: statistics before this step.
        lse: statistics with it.
    """
    assert packed
    rows = _half(cu_seqlens, 1) if only_second_half else torch.arange(int(cu_seqlens[-1]))
    kept = (old_lse[:, rows] - lse[:, rows]).exp().t()[..., None]
    added = (lse_step[:, : len(rows)] - lse[:, rows]).exp().t()[..., None]
    flat, flat_step = out.view(len(out), len(lse), -1), step.view(len(step), len(lse), -1)
    flat[rows] = (flat[rows].float() * kept + flat_step[: len(rows)].float() * added).to(out.dtype)


def thd_grad_correction(grad: Tensor, step: Tensor, cu_seqlens: Tensor, first: str, second: str) -> None:
    """Zero, overwrite, add to or leave the first and the second halves of a gradient, in place.

    Args:
        step: the step's gradient; of the halves that it changes, or of all rows if it changes both.
        first: `zero`, `copy`, `add` or `none`.
        second: the same.
    """
    both = {first, second} <= {"copy", "add"}
    for half, action in enumerate((first, second)):
        rows = _half(cu_seqlens, half)
        if action == "zero":
            grad[rows] = 0
        elif action != "none":
            given = step[rows] if both else step[: len(rows)]
            grad[rows] = given if action == "copy" else grad[rows] + given


def _half(cu_seqlens: Tensor, half: int) -> Tensor:
    """Rows of one half of every sequence."""
    bounds = cu_seqlens.tolist()
    middles = [(start + end) // 2 for start, end in zip(bounds, bounds[1:])]
    ranges = zip(bounds, middles) if half == 0 else zip(middles, bounds[1:])
    return torch.cat([torch.arange(*each) for each in ranges])
