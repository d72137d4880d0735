"""Megatron on CPU: gloo collectives, unfused kernels, and an adapter for its calls of `torch.cuda`."""

import resource
from pathlib import Path
from typing import Any

import psutil
import torch

from megatron_dsrl.platform.base import MemoryStatistics, Platform


class CpuPlatform(Platform):
    """The host processor."""

    name = "cpu"
    distributed_backend = "gloo"

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def install(self) -> None:
        # Imported here because it imports Megatron, which a caller that only asks for the name need not pay for.
        from megatron_dsrl.platform.torch_cuda_on_cpu import install_torch_cuda_on_cpu

        install_torch_cuda_on_cpu()

    def transformer_config_flags(self, transformer_engine: bool) -> dict[str, Any]:
        assert not transformer_engine, "Transformer Engine has no CPU kernels"
        return {
            "use_cpu_initialization": True,  # weights are made on CPU in any case
            "gradient_accumulation_fusion": False,  # needs apex
            "apply_rope_fusion": False,  # needs Transformer Engine
            "masked_softmax_fusion": False,  # a CUDA kernel
            "persist_layer_norm": False,  # needs apex
            "bias_dropout_fusion": False,  # these two are compiled by torch.compile for CUDA
            "bias_activation_fusion": False,
            "batch_p2p_comm": False,  # gloo has no grouped send and receive
        }

    def memory_statistics(self) -> MemoryStatistics:
        resident_pages = int(Path("/proc/self/statm").read_text().split()[1])
        return MemoryStatistics(
            allocated_bytes=resident_pages * resource.getpagesize(),
            peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,  # Linux counts in KiB
        )

    @property
    def memory_bytes(self) -> int:
        return psutil.virtual_memory().total

    def record_collectives(self, folder: Path) -> None:
        pass  # only NCCL's collectives have a watchdog; gloo's raise an error that names the process

    def release_cached_memory(self) -> None:
        pass  # the allocator of the system has no such cache

    def host_copy(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().clone()
