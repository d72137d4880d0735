"""Time of work on the current device."""

import time
from collections.abc import Callable

import torch

from megatron_dsrl.platform import current_platform


def synchronize() -> None:
    """Wait until the device has done what was asked of it."""
    if current_platform().name == "cuda":
        torch.cuda.synchronize()


def seconds_of(work: Callable[[], object]) -> float:
    """Time of one call, until the device is done."""
    synchronize()
    begin = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - begin
