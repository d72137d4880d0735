"""The interface between the device and the rest of the program."""

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch


@dataclass(frozen=True)
class MemoryStatistics:
    """Memory of this process on its device; on CPU, its resident memory."""

    allocated_bytes: int

    peak_bytes: int
    """Peak since the process started."""

    recent_peak_bytes: int
    """Peak since the last call of `Platform.restart_peak_memory`."""


class Platform(ABC):
    """A kind of device, with the settings that Megatron and torch.distributed need for it."""

    name: Literal["cpu", "cuda"]
    distributed_backend: Literal["gloo", "cpu:gloo,cuda:nccl"]
    """Backend of torch.distributed. Python objects are sent over gloo on both platforms: ranks that wait for rank 0's
    samples must not wait in a kernel on the device that the engine samples on."""

    usual_engine_start: str
    """How long an engine usually takes to start, for messages."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """The device of this process."""

    def prepare_imports(self) -> None:  # noqa: B027  # nothing to prepare where fused functions are compiled
        """Call it before importing Megatron for the first time; it only saves time."""

    @abstractmethod
    def install(self) -> None:
        """Make Megatron usable in this process. Idempotent; call it before building a model."""

    @abstractmethod
    def transformer_config_flags(self, transformer_engine: bool) -> dict[str, Any]:
        """TransformerConfig fields that depend on the platform: available fused kernels, where weights are initialised.
        `transformer_engine`: whether the layers are Transformer Engine's."""

    @abstractmethod
    def memory_statistics(self) -> MemoryStatistics:
        """Memory use of this process."""

    @abstractmethod
    def restart_peak_memory(self) -> None:
        """Reset the recent peak to the current use, if the system permits it."""

    @property
    @abstractmethod
    def memory_bytes(self) -> int:
        """Total memory of this process's device in bytes; on CPU, of the machine."""

    def record_collectives(self, folder: Path) -> None:  # noqa: B027  # gloo's own error names the process
        """Have torch.distributed dump each process's recent collectives into a folder when a collective times out.

        Call it before initialising torch.distributed. Existing environment variables are kept.
        """

    def prepare_weight_broadcast(self) -> None:  # noqa: B027  # the settings are NCCL's
        """Give this process the collective settings of SGLang's processes, to form groups with them.

        Call it before initialising torch.distributed. Existing environment variables are kept.
        """

    def annotation(self, name: str) -> AbstractContextManager[None]:
        """A named range of this thread for the device's own profiler (NVTX on NVIDIA GPUs)."""
        return nullcontext()

    @property
    def attends_to_packed_rows(self) -> bool:
        """Whether Transformer Engine has an attention kernel for packed rows on this device."""
        return False

    def release_cached_memory(self) -> None:  # noqa: B027  # PyTorch has no caching allocator on CPU
        """Return memory that PyTorch caches but no tensor uses to the device, for the engine that shares it."""

    @abstractmethod
    def host_copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy in host memory, pinned if the device transfers faster from pinned memory."""
