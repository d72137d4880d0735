"""What the rest of the program may know about the device."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch


@dataclass(frozen=True)
class MemoryStatistics:
    """Memory of this process on its device. On CPU: resident memory of the process."""

    allocated_bytes: int
    """In use now."""

    peak_bytes: int
    """Largest use since the process started."""

    recent_peak_bytes: int
    """Largest use since `Platform.restart_peak_memory` was called last."""


class Platform(ABC):
    """A device kind: what Megatron and torch.distributed must be told about it."""

    name: Literal["cpu", "cuda"]
    distributed_backend: Literal["gloo", "cpu:gloo,cuda:nccl"]
    """Of torch.distributed. Python objects travel over gloo in either case: the ranks that wait for rank 0's samples
    must not wait in a kernel on the device that the engine samples on."""

    usual_engine_start: str
    """How long an engine takes to start here, for people who wait for it."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """The device of this process."""

    @abstractmethod
    def install(self) -> None:
        """Make Megatron usable in this process. May be called any number of times, before any model is built."""

    @abstractmethod
    def transformer_config_flags(self, transformer_engine: bool) -> dict[str, Any]:
        """TransformerConfig fields that this platform decides: which fused kernels exist and where weights are made.

        Args:
            transformer_engine: whether the layers are Transformer Engine's.
        """

    @abstractmethod
    def memory_statistics(self) -> MemoryStatistics:
        """Memory of this process, in bytes."""

    @abstractmethod
    def restart_peak_memory(self) -> None:
        """From now on the recent peak counts anew, from what is in use. Where the system permits it."""

    @property
    @abstractmethod
    def memory_bytes(self) -> int:
        """All memory of this process's device. On CPU: of the machine."""

    @abstractmethod
    def record_collectives(self, folder: Path) -> None:
        """Have torch.distributed write what every process was doing into a folder when a collective takes too long.

        To be called before torch.distributed starts. What the environment says already is kept.
        """

    @abstractmethod
    def release_cached_memory(self) -> None:
        """Give memory that PyTorch holds but no tensor uses back to the device, for the engine that shares it."""

    @abstractmethod
    def host_copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy in host memory, of a kind that the device exchanges with quickly."""
