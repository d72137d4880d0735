"""Megatron on NVIDIA GPUs: only settings, no adapters."""

import gc
import os
from contextlib import AbstractContextManager
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from megatron_dsrl.common.errors import UserError
from megatron_dsrl.platform.base import MemoryStatistics, Platform

RECORDED_COLLECTIVES = 2000
"""Number of recent collectives that each process records, a few hundred bytes each."""


def flight_recorder_variables(folder: Path) -> dict[str, str]:
    """Environment variables that make PyTorch dump recent NCCL collectives to `<folder>/rank_<number>` on a timeout.

    `torchfrtrace --prefix rank_ <folder>` compares the dumps and names the processes that did not take part. PyTorch
    2.13 reads the newer names of the first two settings; older releases read the `TORCH_NCCL_...` names.
    """
    prefix = str(folder / "rank_")
    return {
        "TORCH_FR_BUFFER_SIZE": str(RECORDED_COLLECTIVES),
        "TORCH_FR_DUMP_TEMP_FILE": prefix,
        "TORCH_NCCL_TRACE_BUFFER_SIZE": str(RECORDED_COLLECTIVES),
        "TORCH_NCCL_DEBUG_INFO_TEMP_FILE": prefix,
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "3",  # the default: the process ends after the timeout
    }


WEIGHT_BROADCAST_VARIABLES = {"NCCL_CUMEM_ENABLE": "0", "NCCL_NVLS_ENABLE": "0"}
"""What SGLang 0.5.23 sets in its processes unless they are set already. Both ends of a communicator must agree."""


class CudaPlatform(Platform):
    """One NVIDIA GPU per process, chosen by torchrun's LOCAL_RANK."""

    name = "cuda"
    usual_engine_start = "may take minutes: weights, kernels, CUDA graphs"
    distributed_backend = "cpu:gloo,cuda:nccl"
    _earlier_peak = 0
    """Peak before the last `restart_peak_memory`, in bytes."""

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))

    def install(self) -> None:
        """Choose the GPU. Raises UserError if the process sees too few."""
        device, visible = self.device, torch.cuda.device_count()
        if device.index >= visible:
            raise UserError(
                f"LOCAL_RANK is {device.index}, but this process sees only {visible} GPU(s): every process must see "
                "all GPUs of its node. In SLURM ask for them per node (--gpus-per-node), without --gpus-per-task and "
                "--gpu-bind; otherwise check CUDA_VISIBLE_DEVICES"
            )
        torch.cuda.set_device(device)

    def transformer_config_flags(self, transformer_engine: bool) -> dict[str, Any]:
        return {
            "use_cpu_initialization": False,
            "gradient_accumulation_fusion": find_spec("fused_weight_gradient_mlp_cuda") is not None,  # from apex
            "apply_rope_fusion": transformer_engine,
            "masked_softmax_fusion": False,  # unused: attention is fused by Transformer Engine or PyTorch
            "persist_layer_norm": False,
            "bias_dropout_fusion": True,
            "bias_activation_fusion": True,
            "batch_p2p_comm": True,
        }

    def memory_statistics(self) -> MemoryStatistics:
        return MemoryStatistics(
            allocated_bytes=torch.cuda.memory_allocated(self.device),
            peak_bytes=max(self._earlier_peak, torch.cuda.max_memory_allocated(self.device)),
            recent_peak_bytes=torch.cuda.max_memory_allocated(self.device),
        )

    def restart_peak_memory(self) -> None:
        self._earlier_peak = max(self._earlier_peak, torch.cuda.max_memory_allocated(self.device))
        torch.cuda.reset_peak_memory_stats(self.device)

    @property
    def memory_bytes(self) -> int:
        return torch.cuda.get_device_properties(self.device).total_memory

    def record_collectives(self, folder: Path) -> None:
        """NCCL's flight recorder; variables that the user has set win."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, value in flight_recorder_variables(folder).items():
            os.environ.setdefault(name, value)

    def prepare_weight_broadcast(self) -> None:
        for name, value in WEIGHT_BROADCAST_VARIABLES.items():
            os.environ.setdefault(name, value)

    def annotation(self, name: str) -> AbstractContextManager[None]:
        return torch.cuda.nvtx.range(name)

    @property
    def attends_to_packed_rows(self) -> bool:
        # cuDNN's attention takes packed rows from Hopper on; on older GPUs only flash attention 2 does.
        return torch.cuda.get_device_capability(self.device) >= (9, 0) or _is_installed("flash-attn")

    def release_cached_memory(self) -> None:
        """Also frees buckets that were shared with an engine by CUDA IPC."""
        gc.collect()
        torch.cuda.ipc_collect()  # buckets that the engine has released
        torch.cuda.empty_cache()

    def host_copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """In pinned memory, so that the copy back runs asynchronously."""
        host = torch.empty_like(tensor, device="cpu", pin_memory=True)
        return host.copy_(tensor.detach())


def _is_installed(package: str) -> bool:
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True
