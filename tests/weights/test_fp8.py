"""FP8 weights in blocks of 128 x 128."""

import pytest
import torch

from megatron_dsrl.weights.fp8 import LARGEST, dequantise_blocks, quantise_blocks


def test_every_value_comes_back_within_its_precision() -> None:
    """Half a unit of the last of e4m3's three digits: 1/16 of the value, or of the smallest normal number."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(300, 200, generator=generator).mul_(torch.logspace(-3, 1, 300)[:, None]).to(torch.bfloat16)
    values, scales = quantise_blocks(weight)
    assert (values.dtype, values.shape) == (torch.float8_e4m3fn, weight.shape)
    assert (scales.dtype, scales.shape) == (torch.float32, (3, 2))
    error = (dequantise_blocks(values, scales, torch.float32) - weight.float()).abs()
    scale_of_each = scales.repeat_interleave(128, 0).repeat_interleave(128, 1)[:300, :200]
    assert (error <= torch.maximum(weight.float().abs() / 16, scale_of_each * 2.0**-10)).all()
    assert values.float().abs().max() <= LARGEST


@pytest.mark.parametrize("exponent", [-20, 0, 7])
def test_scales_are_powers_of_two_so_that_what_e4m3_can_write_is_exact(exponent: int) -> None:
    """Also in bfloat16, and when it is quantised again."""
    representable = torch.arange(-127, 128, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    representable = representable[representable.isfinite()]
    row = torch.nn.functional.pad(representable, (0, 256 - len(representable))) * 2.0**exponent
    weight = row.repeat(128, 1)
    values, scales = quantise_blocks(weight)
    mantissa, _ = torch.frexp(scales)
    assert (mantissa == 0.5).all() and scales.shape == (1, 2)
    assert torch.equal(dequantise_blocks(values, scales).float(), weight)
    again, _ = quantise_blocks(dequantise_blocks(values, scales))
    assert torch.equal(again.view(torch.uint8), values.view(torch.uint8))


def test_each_block_has_the_smallest_scale_that_reaches_its_largest_value() -> None:
    weight = torch.zeros(128, 384)
    weight[3, 5], weight[0, 130] = 448.0, -449.0
    values, scales = quantise_blocks(weight)
    assert scales.tolist() == [[1.0, 2.0, 1.0]], "a block of zeros has 1"
    assert values[3, 5].float() == 448 and values.float().isfinite().all()
