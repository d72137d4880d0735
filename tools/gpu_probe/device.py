"""What the device itself does, without this project: matrix products, and copies."""

import argparse
import sys
from collections.abc import Callable

import torch

from megatron_dsrl.platform import current_platform
from tools.gpu_probe.clock import seconds_of
from tools.gpu_probe.reports import Figures, measure_each
from tools.gpu_record.machine import this_gpu
from tools.gpu_record.planned import utilisation

REPETITIONS = 10


def matrix_products(size: int) -> Figures:
    """Rate of bfloat16 products of square matrices."""
    device = current_platform().device
    one, other = (torch.randn(size, size, dtype=torch.bfloat16, device=device) for _ in range(2))
    one @ other
    flops = 2 * size**3 / _shortest(lambda: one @ other)
    return {
        f"bfloat16 products of {size:,} x {size:,}, TFLOP/s": f"{flops / 1e12:.4g}",
        "share of its peak": utilisation(flops, this_gpu()),
    }


def copies(megabytes: int) -> Figures:
    """Rates of copies on the device, and from and to page-locked host memory."""
    device = current_platform().device
    source = torch.ones(megabytes * 10**6, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    host = current_platform().host_copy(source)
    work = {
        "copy on the device": lambda: target.copy_(source),
        "copy to the host": lambda: host.copy_(source),
        "copy from the host": lambda: target.copy_(host),
    }
    return {f"{name}, GB/s": f"{megabytes / 1e3 / _shortest(copy):.4g}" for name, copy in work.items()}


def _shortest(work: Callable[[], object]) -> float:
    return min(seconds_of(work) for _ in range(REPETITIONS))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=8192, help="of the matrices")
    parser.add_argument("--megabytes", type=int, default=2000, help="copied")
    options = parser.parse_args()
    sys.exit(
        measure_each(
            {
                "matrix products": lambda: matrix_products(options.size),
                "copies": lambda: copies(options.megabytes),
            }
        )
    )
