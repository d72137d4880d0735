"""Megatron on NVIDIA GPUs: nothing to adapt, only to choose."""

import gc
import os
from importlib.util import find_spec
from typing import Any

import torch

from megatron_dsrl.platform.base import MemoryStatistics, Platform


class CudaPlatform(Platform):
    """One NVIDIA GPU per process, chosen by torchrun's LOCAL_RANK."""

    name = "cuda"
    distributed_backend = "cpu:gloo,cuda:nccl"

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))

    def install(self) -> None:
        # Megatron overlaps tensor-parallel collectives with matrix products in issue order: one hardware queue.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
        torch.cuda.set_device(self.device)

    def transformer_config_flags(self, transformer_engine: bool) -> dict[str, Any]:
        return {
            "use_cpu_initialization": False,
            "gradient_accumulation_fusion": find_spec("fused_weight_gradient_mlp_cuda") is not None,  # from apex
            "apply_rope_fusion": transformer_engine,
            "masked_softmax_fusion": False,  # attention is Transformer Engine's or PyTorch's fused one
            "persist_layer_norm": False,
            "bias_dropout_fusion": True,
            "bias_activation_fusion": True,
            "batch_p2p_comm": True,
        }

    def memory_statistics(self) -> MemoryStatistics:
        return MemoryStatistics(
            allocated_bytes=torch.cuda.memory_allocated(self.device),
            peak_bytes=torch.cuda.max_memory_allocated(self.device),
        )

    def release_cached_memory(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()

    def host_copy(self, tensor: torch.Tensor) -> torch.Tensor:
        host = torch.empty_like(tensor, device="cpu", pin_memory=True)
        return host.copy_(tensor.detach())
