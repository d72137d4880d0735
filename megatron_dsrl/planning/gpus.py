"""What GPUs can do, from their makers' data sheets (dense bfloat16, without sparsity)."""

from dataclasses import dataclass

from megatron_dsrl.errors import UserError


@dataclass(frozen=True)
class Gpu:
    """One device."""

    name: str
    memory_bytes: int
    """What a process can allocate in all, a little below the number on the box."""
    flops: float
    """Peak of dense bfloat16 matrix products, per second."""
    bytes_per_second: float
    """Memory bandwidth."""


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("a100-40", 39 * 2**30, 312e12, 1.555e12),
        Gpu("a100", 79 * 2**30, 312e12, 2.039e12),
        Gpu("l40s", 44 * 2**30, 362e12, 0.864e12),
        Gpu("h100", 79 * 2**30, 989e12, 3.35e12),
        Gpu("h200", 139 * 2**30, 989e12, 4.8e12),
        Gpu("b200", 178 * 2**30, 2250e12, 7.7e12),
    )
}


def find_gpu(name: str) -> Gpu:
    """The GPU of this name.

    Raises:
        UserError: it is not in the table.
    """
    if name.lower() not in GPUS:
        raise UserError(f"--gpu: {name} is not known; choose one of {', '.join(GPUS)}")
    return GPUS[name.lower()]
