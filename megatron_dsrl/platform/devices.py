"""The compute devices of this machine, as printed by `dsrl doctor`."""

from dataclasses import dataclass

import torch

from megatron_dsrl.platform import current_platform


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
