"""FP8 weights in blocks: e4m3 values and a float32 scale for each block of 128 x 128 (DeepSeek-V3, arXiv 2412.19437).

Scales are powers of two. An e4m3 value times such a scale is exact in bfloat16, and engines on Blackwell, which need
such scales, have nothing to round again. A value's relative error is at most 1/16 either way, unless it is more than
14,000 times smaller than the largest of its block.
"""

import torch
from torch import Tensor

from megatron_dsrl.config.engine_numerics import FP8_BLOCK

LARGEST = torch.finfo(torch.float8_e4m3fn).max
"""448."""


@torch.no_grad()
def quantise_blocks(weight: Tensor) -> tuple[Tensor, Tensor]:
    """
    Args:
        weight: [rows, columns], any float dtype.

    Returns:
        Values [rows, columns] float8_e4m3fn and scales [ceil(rows / 128), ceil(columns / 128)] float32; the weight is
        about value x scale of its block.
    """
    assert weight.dim() == 2, "a matrix"
    rows, columns = weight.shape
    padded = torch.nn.functional.pad(weight.float(), (0, -columns % FP8_BLOCK, 0, -rows % FP8_BLOCK))
    blocks = padded.unflatten(1, (-1, FP8_BLOCK)).unflatten(0, (-1, FP8_BLOCK))  # [block rows, 128, block columns, 128]
    largest = blocks.abs().amax(dim=(1, 3))
    # frexp: x = mantissa * 2^exponent with a mantissa in [0.5, 1), so x <= 2^exponent, with equality left out.
    mantissa, exponent = torch.frexp(largest / LARGEST)
    exponent = exponent - (mantissa == 0.5).to(exponent.dtype)
    scales = torch.where(largest == 0, 1.0, torch.ldexp(torch.ones_like(largest), exponent))
    values = (blocks / scales[:, None, :, None]).to(torch.float8_e4m3fn)
    return values.flatten(2, 3).flatten(0, 1)[:rows, :columns].contiguous(), scales


@torch.no_grad()
def dequantise_blocks(values: Tensor, scales: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """The matrix that the result of `quantise_blocks` represents, [rows, columns]."""
    rows, columns = values.shape
    repeated = scales.repeat_interleave(FP8_BLOCK, dim=0).repeat_interleave(FP8_BLOCK, dim=1)
    return (values.float() * repeated[:rows, :columns]).to(dtype)
