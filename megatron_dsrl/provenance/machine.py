"""What a run computes on: Python, packages, devices, and the scheduler's job."""

import os
import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_dsrl.doctor.device import driver_version
from megatron_dsrl.doctor.doctor import ESSENTIAL_PACKAGES
from megatron_dsrl.doctor.kernels import installed_version

PACKAGES = (
    *ESSENTIAL_PACKAGES,
    *("megatron-dsrl", "numpy", "triton", "transformer-engine-torch", "flash-attn", "flash-attn-4", "apex"),
    *("sglang-kernel", "flashinfer-python", "nvidia-nccl-cu12", "nvidia-nccl-cu13", "nvidia-cudnn-cu13", "torchvision"),
)
"""The packages that `dsrl doctor` lists, and the libraries that compute on a GPU. Packages that are not installed
are left out."""
PROCESSORS = Path("/proc/cpuinfo")
SLURM_NAMES = (
    *("SLURM_JOB_ID", "SLURM_JOB_NAME", "SLURM_JOB_PARTITION", "SLURM_JOB_NODELIST", "SLURM_JOB_NUM_NODES"),
    *("SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_RESTART_COUNT", "SLURM_CLUSTER_NAME", "SLURM_GPUS_ON_NODE"),
)


def python_version() -> str:
    """Version, implementation and interpreter, such as `3.12.3 CPython (/opt/dsrl/bin/python)`."""
    return f"{platform.python_version()} {platform.python_implementation()} ({sys.executable})"


def package_versions() -> dict[str, str]:
    """Versions of the installed packages in `PACKAGES`, from their metadata, without importing them."""
    versions = {name: installed_version(name) for name in PACKAGES}
    return {name: version for name, version in versions.items() if version is not None}


def devices() -> dict[str, Any]:
    """The devices of this process's machine, CUDA and driver; the processor's name on CPU."""
    from megatron_dsrl.platform import take_inventory

    found = take_inventory()
    return {
        "platform": found.platform,
        "names": list(found.names),
        "cuda": found.torch_cuda_version,
        "driver": driver_version(),
        "processor": processor_name(PROCESSORS),
        "usable_cores": len(os.sched_getaffinity(0)),
        "system": platform.platform(),
    }


def processor_name(file: Path) -> str:
    """The model of the first processor in `/proc/cpuinfo`; the architecture where it names none (ARM)."""
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines() if file.is_file() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.machine())


def slurm_job(environment: Mapping[str, str]) -> dict[str, str] | None:
    """The SLURM job of this process: id, name, array task, restart count, nodes; None outside SLURM."""
    if "SLURM_JOB_ID" not in environment:
        return None
    return {name.removeprefix("SLURM_").lower(): environment[name] for name in SLURM_NAMES if name in environment}
