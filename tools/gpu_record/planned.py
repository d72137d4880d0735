"""The predictions of `dsrl plan` that a record shows beside the measured figures."""

from megatron_dsrl.config.run import RunConfig
from megatron_dsrl.model.architecture import Architecture
from megatron_dsrl.planning.fit import RESERVE_BYTES, RunMemory, run_memory
from megatron_dsrl.planning.gpus import Gpu

GIB = 2**30


def utilisation(flops_per_second: float, gpu: Gpu | None) -> str:
    """Share of a GPU's peak."""
    return f"{flops_per_second / gpu.flops:.1%} of {gpu.flops / 1e12:.0f} TFLOP/s" if gpu else "no peak known"


def planned_memory(config: RunConfig, architecture: Architecture, gpu: Gpu | None, gpus: int = 1) -> dict[str, str]:
    """Memory peaks predicted by `dsrl plan`, for comparison with the measured ones; empty for an unknown GPU."""
    if gpu is None:
        return {}
    memory = run_memory(config, architecture, gpu.memory_bytes, gpus)
    peaks = {f"device, planned peak of {what}, GiB": f"{peak / GIB:.2f}" for what, peak in memory.peaks.items()}
    return {"trainer, planned peak, GiB": f"{planned_trainer_bytes(memory) / GIB:.2f}"} | peaks


def planned_trainer_bytes(memory: RunMemory) -> int:
    """Planned peak of what PyTorch allocates in the trainer's process."""
    return memory.peak_update - memory.engine_released - RESERVE_BYTES
