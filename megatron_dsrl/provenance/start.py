"""`provenance.jsonl`: one record for every start of a command in a folder, written before its work begins.

The record documents what produced the results. It names what could not be determined; if it cannot be written, the run
prints a warning and continues.
"""

import json
import os
import platform
import socket
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from megatron_dsrl.common.collective import gather, rank, world_size
from megatron_dsrl.doctor.device import driver_version
from megatron_dsrl.doctor.doctor import ESSENTIAL_PACKAGES
from megatron_dsrl.doctor.kernels import installed_version
from megatron_dsrl.observability.records import PROVENANCE_FILE, repair_records
from megatron_dsrl.provenance.code import code_of_checkout, code_of_package

PACKAGE_FOLDER = Path(__file__).resolve().parent.parent
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

Details = Mapping[str, Callable[[], Any]]
"""Additional entries of a record by name, determined when the record is made. Values are JSON."""


def record_start(folder: Path, command: str, details: Details, report: Callable[[str], None]) -> None:
    """Append a record to the folder's `provenance.jsonl`. Collective; rank 0 writes.

    Args:
        folder: that the command writes into; must exist.
        details: what to record besides code, packages and machine; called on rank 0 only.
        report: called with a warning on rank 0 if there can be no record.
    """
    record_found(folder, command, lambda: find_out(details), report)


def find_out(details: Details) -> dict[str, Any]:
    """Code, packages, machine and these details, as a record has them. Not collective, and can run in a thread."""
    return {name: _found_out(find) for name, find in {**_SURROUNDINGS, **details}.items()}


def record_found(
    folder: Path, command: str, found: Callable[[], Mapping[str, Any]], report: Callable[[str], None]
) -> None:
    """Like `record_start`, with details that are already being collected. Collective; rank 0 writes. `found` returns
    what `find_out` did; called on rank 0 only."""
    hosts = list(dict.fromkeys(gather(socket.gethostname())))
    if rank() != 0:
        return
    now = time.time()
    record = {
        "time": now,
        "utc": f"{datetime.fromtimestamp(now, UTC):%Y-%m-%dT%H:%M:%SZ}",
        "command": command,
        "command_line": sys.orig_argv,
        "working_folder": os.getcwd(),
        "hosts": hosts,
        "world_size": world_size(),
        "slurm": slurm_job(os.environ),
        **found(),
    }
    try:
        _append(folder / PROVENANCE_FILE, record)
    except Exception as error:  # a full disk, a damaged file, something that is not JSON: the run is worth more
        report(f"warning: what produced this run is not recorded in {folder / PROVENANCE_FILE}: {error}")


def _code() -> dict[str, Any]:
    """Commit of this program, and of the current folder if that is another checkout, for example one with custom
    rewards."""
    program, here = code_of_package(PACKAGE_FOLDER, "megatron-dsrl"), code_of_checkout(Path.cwd())
    is_another = here.commit is not None and here != program
    return {**asdict(program), "working_folder": asdict(here) if is_another else None}


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
    """The model of the first processor in `/proc/cpuinfo`; the architecture if it names none (Arm)."""
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines() if file.is_file() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.machine())


def slurm_job(environment: Mapping[str, str]) -> dict[str, str] | None:
    """The SLURM job of this process: id, name, array task, restart count, nodes; None outside SLURM."""
    if "SLURM_JOB_ID" not in environment:
        return None
    return {name.removeprefix("SLURM_").lower(): environment[name] for name in SLURM_NAMES if name in environment}


_SURROUNDINGS: Details = {
    "code": _code,
    "python": python_version,
    "packages": package_versions,
    "device": devices,
}


def _found_out(find: Callable[[], Any]) -> Any:
    try:
        return find()
    except Exception as error:
        return {"unknown": f"{type(error).__name__}: {error}"}


def _append(file: Path, record: Mapping[str, Any]) -> None:
    line = json.dumps(record, ensure_ascii=False) + "\n"
    repair_records(file)
    with file.open("a", encoding="utf-8") as stream:
        stream.write(line)
