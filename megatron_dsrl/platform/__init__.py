"""Device-specific code. Only this package may check whether CUDA is available."""

import os
from functools import cache

import torch

from megatron_dsrl.platform.base import MemoryStatistics, Platform, silence_expected_warnings
from megatron_dsrl.platform.cpu import CpuPlatform
from megatron_dsrl.platform.cuda import CudaPlatform

__all__ = ["MemoryStatistics", "Platform", "current_platform", "silence_expected_warnings"]


@cache
def current_platform() -> Platform:
    """The platform of this process: CUDA if PyTorch finds a device, else CPU."""
    # Megatron needs one hardware queue to overlap tensor-parallel collectives with matrix products in issue order. The
    # driver reads the variable when it starts, which the next line makes it do. SGLang's processes set their own value.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    return CudaPlatform() if torch.cuda.is_available() else CpuPlatform()
