"""Megatron on CPU: gloo collectives, unfused kernels, and an adapter for calls to `torch.cuda`."""

import re
import resource
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import torch

from megatron_dsrl.platform.base import MemoryStatistics, Platform


class CpuPlatform(Platform):
    """The host processor."""

    name = "cpu"
    usual_engine_start = "usually 15 s"
    distributed_backend = "gloo"
    _earlier_peak = 0
    """Peak before the last `restart_peak_memory`, in bytes."""

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def prepare_imports(self) -> None:
        disable_compilation()  # nothing is compiled on a CPU

    def install(self) -> None:
        # Imported here so that callers that only need the platform's name do not have to import Megatron.
        from megatron_dsrl.platform.torch_cuda_on_cpu import install_torch_cuda_on_cpu

        install_torch_cuda_on_cpu()

    def transformer_config_flags(self, transformer_engine: bool) -> dict[str, Any]:
        assert not transformer_engine, "Transformer Engine has no CPU kernels"
        return {
            "use_cpu_initialization": True,
            "gradient_accumulation_fusion": False,  # needs apex
            "apply_rope_fusion": False,  # needs Transformer Engine
            "masked_softmax_fusion": False,  # a CUDA kernel
            "persist_layer_norm": False,  # needs apex
            "bias_dropout_fusion": False,  # these two are compiled by torch.compile for CUDA
            "bias_activation_fusion": False,
            "batch_p2p_comm": False,  # gloo has no grouped send and receive
        }

    def memory_statistics(self) -> MemoryStatistics:
        """Resident memory of the process: weights, activations and everything else."""
        resident_pages = int(Path("/proc/self/statm").read_text().split()[1])
        recent_peak = _recent_peak_bytes()
        return MemoryStatistics(
            allocated_bytes=resident_pages * resource.getpagesize(),
            peak_bytes=max(self._earlier_peak, recent_peak),
            recent_peak_bytes=recent_peak,
        )

    def restart_peak_memory(self) -> None:
        """Has no effect in containers that do not permit writing to `/proc/self/clear_refs`."""
        self._earlier_peak = max(self._earlier_peak, _recent_peak_bytes())
        with suppress(OSError):  # some containers do not permit it; the recent peak is then that of the process
            Path("/proc/self/clear_refs").write_text("5")

    @property
    def memory_bytes(self) -> int:
        """Memory of the whole machine, which all processes and engines share."""
        return psutil.virtual_memory().total

    def host_copy(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().clone()


def _recent_peak_bytes() -> int:
    """The kernel's high-water mark of resident memory."""
    kib = re.search(r"^VmHWM:\s*(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert kib is not None, "Linux always reports VmHWM"
    return int(kib[1]) * 1024


def disable_compilation() -> None:
    """Let `torch.compile` return functions as they are: on a CPU neither trainer nor engines compile. Idempotent.

    Call it before importing `sglang` or `megatron`. They decorate functions with it when they are imported, and the
    decorator alone imports PyTorch's compiler: a tenth of the time of either import.
    """
    torch.compile = uncompiled  # type: ignore[assignment]


def uncompiled(function: Callable | None = None, **options: Any) -> Callable:
    """Takes the place of `torch.compile`, with its signature: `torch.compile(f, ...)`, `@torch.compile`,
    `@torch.compile(...)`."""
    return uncompiled if function is None else function
