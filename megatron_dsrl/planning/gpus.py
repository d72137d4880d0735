"""Peak rates and memory of GPUs, from their makers' data sheets: dense bfloat16, without sparsity."""

from dataclasses import dataclass

from megatron_dsrl.common.errors import UserError


@dataclass(frozen=True)
class Gpu:
    """One device."""

    name: str
    memory_bytes: int
    """Memory that a process can allocate: up to 1 GiB below the total that nvidia-smi or rocm-smi shows."""
    flops: float
    """Peak of dense bfloat16 matrix products with float32 accumulation, per second."""
    bytes_per_second: float
    """Memory bandwidth."""
    source: str
    """Source of the peak and the bandwidth."""


def _gpu(name: str, gib: float, tflops: float, terabytes_per_second: float, source: str) -> Gpu:
    return Gpu(name, int(gib * 2**30), tflops * 1e12, terabytes_per_second * 1e12, source)


GPUS = {
    gpu.name: gpu
    for gpu in (
        _gpu("a10", 22, 125, 0.600, "NVIDIA A10 data sheet"),
        _gpu("l4", 22, 121, 0.300, "NVIDIA L4 data sheet"),
        _gpu("l40s", 44, 362, 0.864, "NVIDIA L40S data sheet"),
        _gpu("rtx-a6000", 47, 154.8, 0.768, "NVIDIA Ampere GA102 white paper"),
        _gpu("rtx-3090", 23, 71, 0.936, "NVIDIA Ampere GA102 white paper"),
        _gpu("rtx-4090", 23, 165.2, 1.008, "NVIDIA Ada white paper"),
        _gpu("rtx-5090", 31, 209.5, 1.792, "NVIDIA RTX Blackwell white paper"),
        _gpu("a100-40", 39, 312, 1.555, "NVIDIA A100 data sheet, SXM"),
        _gpu("a100", 79, 312, 2.039, "NVIDIA A100 data sheet, SXM"),
        _gpu("a800", 79, 312, 2.039, "NVIDIA A800 data sheet, SXM"),
        _gpu("h20", 95, 148, 4.0, "no public data sheet; as resellers and SGLang users report it"),
        _gpu("h800", 79, 989, 3.35, "NVIDIA H800 data sheet, SXM"),
        _gpu("h100-pcie", 79, 756, 2.0, "NVIDIA H100 data sheet, PCIe"),
        _gpu("h100", 79, 989, 3.35, "NVIDIA H100 data sheet, SXM"),
        _gpu("gh200", 94, 989, 4.0, "NVIDIA GH200 data sheet, 96 GB of HBM3"),
        _gpu("h200", 139, 989, 4.8, "NVIDIA H200 data sheet, SXM"),
        _gpu("b200", 178, 2250, 7.7, "NVIDIA HGX B200 data sheet"),
        _gpu("gb200", 184, 2500, 8.0, "NVIDIA GB200 NVL72 data sheet, per GPU"),
        _gpu("b300", 267, 2250, 7.7, "NVIDIA HGX B300 data sheet"),
        _gpu("mi300x", 191, 1307, 5.3, "AMD Instinct MI300X data sheet"),
        _gpu("mi325x", 255, 1307, 6.0, "AMD Instinct MI325X data sheet"),
    )
}
"""GPUs by name. AMD's are for planning only; the project runs on CPUs and CUDA."""


def find_gpu(
    name: str, gib: float | None = None, tflops: float | None = None, terabytes_per_second: float | None = None
) -> Gpu:
    """A GPU from the table, or one that the user describes.

    Args:
        name: one of `GPUS` in upper or lower case, or any name if all three figures are given.
        gib: allocatable memory in GiB, instead of the table's.
        tflops: peak of dense bfloat16 in 1e12 operations per second, instead of the table's.
        terabytes_per_second: memory bandwidth in 1e12 bytes per second, instead of the table's.

    Raises:
        UserError: the name is unknown and a figure is missing.
    """
    known = GPUS.get(name.lower())
    if known is None:
        if gib is None or tflops is None or terabytes_per_second is None:
            raise UserError(
                f"--gpu: {name} is not known; choose one of {', '.join(GPUS)}, or describe it with --gpu-memory GIB "
                "--gpu-tflops N --gpu-bandwidth TB/S"
            )
        return _gpu(name, gib, tflops, terabytes_per_second, source="the command line")
    if gib is tflops is terabytes_per_second is None:
        return known
    return Gpu(
        known.name,
        known.memory_bytes if gib is None else int(gib * 2**30),
        known.flops if tflops is None else tflops * 1e12,
        known.bytes_per_second if terabytes_per_second is None else terabytes_per_second * 1e12,
        f"{known.source}, and the command line",
    )
