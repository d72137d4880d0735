"""Norms and matrix products of Transformer Engine in PyTorch. Products accumulate in float32, as cuBLAS does."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["generic_gemm", "rmsnorm_bwd", "rmsnorm_fwd", "te_general_grouped_gemm"]

DTYPES = {4: torch.float32, 5: torch.float16, 6: torch.bfloat16}
"""By the values of `DType`."""


def rmsnorm_fwd(
    x: Tensor,
    weight: Tensor,
    eps: float,
    out: Tensor | None,
    quantizer: None,
    out_dtype: int,
    sm_margin: int,
    zero_centered: bool,
) -> tuple[Tensor, None, Tensor]:
    """Norm of [n, h] `x`: the normalised rows, nothing (a mean, in LayerNorm), and 1/rms of every row in float32."""
    assert quantizer is None and not zero_centered
    inverse = torch.rsqrt(x.float().square().mean(-1) + eps)
    result = (x.float() * inverse[:, None] * weight.float()).to(DTYPES[int(out_dtype)])
    return (result if out is None else out.copy_(result)), None, inverse


def rmsnorm_bwd(
    grad: Tensor, x: Tensor, inverse: Tensor, weight: Tensor, sm_margin: int, zero_centered: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of `rmsnorm_fwd` for `x` and `weight`."""
    assert not zero_centered
    normalised, scaled = x.float() * inverse[:, None], grad.float() * weight.float()
    grad_x = (scaled - normalised * (scaled * normalised).mean(-1, keepdim=True)) * inverse[:, None]
    return grad_x.to(x.dtype), (grad.float() * normalised).sum(0).to(weight.dtype)


def generic_gemm(
    a: Tensor,
    transpose_a: bool,
    b: Tensor,
    transpose_b: bool,
    out: Tensor | None,
    quantizer: None,
    out_dtype: int | None,
    bias: Tensor | None,
    bias_dtype: int,
    gelu: bool,
    gelu_in: Tensor | None,
    grad: bool,
    workspace: Tensor,
    workspace_size: int,
    accumulate: bool,
    use_split_accumulator: bool,
    *,
    comm_overlap: None = None,
    alpha: float = 1.0,
    **_: Any,
) -> tuple[Tensor, Tensor | None, None, None]:
    """`op(b) @ op(a)`, which is `op(a) @ op(b)` of cuBLAS's column-major matrices: result and gradient of the bias.

    Args:
        out: receives the result, or with `accumulate` is added to.
        bias: added to the result; with `grad`, its gradient is the sum of the rows of `b` instead.
    """
    assert quantizer is None and not gelu and comm_overlap is None
    product = alpha * _product(a, transpose_a, b, transpose_b)
    bias_grad = None
    if bias is not None and bias.numel():
        if grad:
            bias_grad = b.reshape(-1, b.shape[-1]).float().sum(0).to(bias.dtype)
        else:
            product += bias.float()
    if not transpose_b:
        product = product.view(*b.shape[:-1], product.shape[-1])
    if out is None:
        dtype = a.dtype if out_dtype is None else DTYPES[int(out_dtype)]
        return product.to(dtype), bias_grad, None, None
    return _store(out, product, accumulate), bias_grad, None, None


def te_general_grouped_gemm(
    a: Sequence[Tensor],
    transpose_a: bool,
    b: Sequence[Tensor],
    transpose_b: bool,
    out: Sequence[Tensor],
    out_dtype: int,
    splits: Sequence[int] | None,
    bias: Sequence[Tensor],
    bias_dtype: int,
    single_output: bool,
    pre_gelu: Sequence[Tensor],
    grad: bool,
    workspaces: Sequence[Tensor],
    workspace_size: int,
    accumulate: bool,
    use_split_accumulator: bool,
    sm_count: int,
) -> Sequence[Tensor]:
    """`generic_gemm` of every pair, without biases.

    Args:
        out: one tensor per pair, or with `single_output` one for all, with `splits` rows for each pair.
    """
    assert all(each.numel() == 0 for each in bias), "experts have no biases"
    parts = out[0].split(list(splits or [])) if single_output else out
    for first, second, part in zip(a, b, parts, strict=True):
        if part.numel():
            _store(part, _product(first, transpose_a, second, transpose_b), accumulate)
    return bias


def _product(a: Tensor, transpose_a: bool, b: Tensor, transpose_b: bool) -> Tensor:
    left, right = b.reshape(-1, b.shape[-1]).float(), a.reshape(-1, a.shape[-1]).float()
    return (left.t() if transpose_b else left) @ (right.t() if transpose_a else right)


def _store(out: Tensor, product: Tensor, accumulate: bool) -> Tensor:
    product = product.view(out.shape)
    return out.add_(product.to(out.dtype)) if accumulate else out.copy_(product)
