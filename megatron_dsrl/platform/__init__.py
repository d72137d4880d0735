"""Device-specific code. Only this package may check whether CUDA is available."""

import logging
import os
import warnings
from dataclasses import dataclass
from functools import cache

import torch

from megatron_dsrl.platform.base import Platform
from megatron_dsrl.platform.cpu import CpuPlatform
from megatron_dsrl.platform.cuda import CudaPlatform


@cache
def current_platform() -> Platform:
    """The platform of this process: CUDA if PyTorch finds a device, else CPU."""
    # Megatron needs one hardware queue to overlap tensor-parallel collectives with matrix products in issue order. The
    # driver reads the variable when it starts, which the next line makes it do. SGLang's processes set their own value.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    return CudaPlatform() if torch.cuda.is_available() else CpuPlatform()


@dataclass(frozen=True)
class DeviceInventory:
    """The devices that a run on this machine would use."""

    platform: str
    """`cpu` or `cuda`."""

    names: tuple[str, ...]
    """One per CUDA device; empty on CPU."""

    torch_cuda_version: str | None
    """CUDA version of the torch build; None for the CPU build."""


def take_inventory() -> DeviceInventory:
    """List the devices without creating a CUDA context."""
    platform = current_platform().name
    count = torch.cuda.device_count() if platform == "cuda" else 0
    return DeviceInventory(
        platform=platform,
        names=tuple(torch.cuda.get_device_name(index) for index in range(count)),
        torch_cuda_version=torch.version.cuda,
    )


EXPECTED_WARNINGS = (
    "Transformer Engine and Apex are not installed",  # both are optional; `dsrl doctor` reports them
    "Apex is not installed",
    "full scope is deprecated",  # about a default of Megatron's configuration
    "The following imports from `dynamic_context.py`",  # from Megatron's own imports
    "MimoModelConfig is experimental",  # a model class that is imported but not used
    "torch.distributed is disabled, unavailable or uninitialized",  # each rank reads the common part on its own
    "The argument order of load has been changed",  # Megatron's call of torch
    "Please use DTensor instead",  # about the tensor class of Megatron's checkpoints
)


def silence_expected_warnings() -> None:
    """Call it once, before importing Megatron: some of these warnings are issued during the import."""
    for message in EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    # "GPTModel IS DEPRECATED": the model class of the pinned Megatron release.
    logging.getLogger("megatron.core.models.gpt.gpt_model").setLevel(logging.ERROR)
    # "MCore's async save is deprecated": its synchronous save uses it too; the replacement is another package.
    logging.getLogger("megatron.core.dist_checkpointing").setLevel(logging.ERROR)
