"""Device section of `dsrl doctor`: the GPUs that torch sees or why it sees none, and the compiler."""

import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_dsrl.common.numbers import counted
from megatron_dsrl.doctor.kernels import Finding, Severity

OLDEST_DRIVERS = {11: 450, 12: 525, 13: 580}
"""Minimum driver for each major CUDA version (NVIDIA's CUDA Compatibility guide, minor version compatibility)."""
DRIVER_FILE = Path("/proc/driver/nvidia/version")


def driver_version(file: Path = DRIVER_FILE) -> str | None:
    """Version of the loaded NVIDIA driver, such as `580.95.05`; None if no driver is loaded."""
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    found = re.search(r"^NVRM version: .*?  (\d[\d.]+) ", text, re.MULTILINE)
    return found.group(1) if found else None


def examine_device(
    names: Sequence[str], torch_cuda: str | None, driver: str | None, environment: Mapping[str, str]
) -> Finding:
    """The device that a run would compute on. In a SLURM job that was given GPUs, finding none is a problem.

    `names` are those of the CUDA devices that torch sees; for `torch_cuda` see `examine_kernels`, for `driver`
    `driver_version`.
    """
    if names:
        kinds = ", ".join(sorted(set(names)))
        found = f"{counted(len(names), 'CUDA device')}: {kinds}; CUDA {torch_cuda}, driver {driver}"
        return Finding("device", "ok", found)
    severity: Severity = "problem" if environment.get("SLURM_GPUS_ON_NODE", "0") not in ("", "0") else "note"
    if torch_cuda is None and driver is None:
        return Finding("device", "ok", "CPU (torch is the CPU build); tiny models only")
    if torch_cuda is None:
        found = f"CPU: torch is the CPU build, on a machine with an NVIDIA driver ({driver})"
        return Finding("device", severity, found, "to use its GPUs, use the image or tools/image/install.sh")
    reason, advice = _why_torch_sees_none(torch_cuda, driver, environment)
    found = f"CPU: torch is built for CUDA {torch_cuda} but sees no device; {reason}"
    return Finding("device", severity, found, advice)


def _why_torch_sees_none(torch_cuda: str, driver: str | None, environment: Mapping[str, str]) -> tuple[str, str]:
    """The reason, and what to do about it."""
    oldest = OLDEST_DRIVERS.get(int(torch_cuda.partition(".")[0]))
    if driver is None:
        advice = f"on a GPU machine install one ({oldest} or newer); on a CPU machine nothing is missing"
        return "no NVIDIA driver is loaded", advice
    if oldest is not None and int(driver.partition(".")[0]) < oldest:
        advice = f"CUDA {torch_cuda} needs {oldest} or newer: update the driver"
        return f"the driver {driver} is too old for it", advice
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible in ("", "-1"):
        advice = "unset it to use them; in a SLURM job ask for GPUs (--gpus-per-node)"
        return f"CUDA_VISIBLE_DEVICES={visible} hides all", advice
    return f"the driver {driver} is loaded", (
        "pass the GPUs through: docker run --gpus all, apptainer exec --nv, sbatch --gpus-per-node; `nvidia-smi` says "
        "whether they work"
    )


def examine_cuda_compiler(torch_cuda: str, environment: Mapping[str, str] = os.environ) -> Finding:
    """nvcc, where SGLang looks for it: it compiles some of its kernels on first use."""
    topic = "CUDA compiler (nvcc)"
    home = environment.get("CUDA_HOME") or environment.get("CUDA_PATH")
    on_path = shutil.which("nvcc", path=environment.get("PATH"))
    nvcc = Path(home, "bin", "nvcc") if home else Path(on_path or "/usr/local/cuda/bin/nvcc")
    toolkit = f"set CUDA_HOME to the folder of a toolkit for CUDA {torch_cuda}"
    if not os.access(nvcc, os.X_OK):
        return Finding(topic, "note", f"{nvcc} not found", f"SGLang compiles kernels with it: {toolkit}")
    release = _release(nvcc)
    if release is None:
        return Finding(topic, "note", f"{nvcc} does not report its version", toolkit)
    found = f"{release} ({nvcc})"
    if release.partition(".")[0] != torch_cuda.partition(".")[0]:
        advice = f"what it compiles may not load beside torch's libraries: {toolkit}"
        return Finding(topic, "note", f"{found}, but torch is built for CUDA {torch_cuda}", advice)
    return Finding(topic, "ok", found)


def _release(nvcc: Path) -> str | None:
    """Its CUDA version, such as `13.0`; None if it cannot be run or prints something else."""
    try:
        said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    release = re.search(r"release (\d+\.\d+)", said)
    return release.group(1) if release else None
