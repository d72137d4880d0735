"""Device-specific code. Only this package may check whether CUDA is available."""

from functools import cache

import torch

from megatron_dsrl.platform.base import MemoryStatistics, Platform
from megatron_dsrl.platform.cpu import CpuPlatform
from megatron_dsrl.platform.cuda import CudaPlatform
from megatron_dsrl.platform.expected_warnings import silence_expected_warnings

__all__ = ["MemoryStatistics", "Platform", "current_platform", "silence_expected_warnings"]


@cache
def current_platform() -> Platform:
    """The platform of this process: CUDA if PyTorch finds a device, else CPU."""
    return CudaPlatform() if torch.cuda.is_available() else CpuPlatform()
