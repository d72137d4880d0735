"""How many threads the trainer and the engines use on a CPU, and how they wait for each other.

They take turns, so each may use all cores of its rank while the other sleeps. But a small model has little work in each
operation, and synchronising many threads then costs more than they save. The engine decodes one token of each response
at a time, so it reaches that point earlier than the trainer.
"""

import os
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path

PARAMETERS_PER_TRAINER_THREAD = 300_000
PARAMETERS_PER_ENGINE_THREAD = 20_000_000
"""Model size that is worth one more thread."""

BFLOAT16_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16", "svebf16"})
"""Names in /proc/cpuinfo of instructions for bfloat16 products: two on x86, two on Arm."""

SPINS = "1000"
"""How often an idle OpenMP thread looks for work before it sleeps; some microseconds."""


@dataclass(frozen=True)
class CpuThreads:
    """Numbers of threads of one rank."""

    trainer: int
    engine: int
    """Threads of each of the engine's processes."""
    cores: int
    """Cores of this rank; OMP_NUM_THREADS is an upper limit."""

    def __str__(self) -> str:
        return f"{self.trainer} for the trainer, {self.engine} for its engine, of {self.cores} cores"


def cpu_threads(
    parameters: int,
    trainer: int | None = None,
    engine: int | None = None,
    cores: int | None = None,
    environment: Mapping[str, str] = os.environ,
) -> CpuThreads:
    """Choose the threads of a rank.

    Args:
        parameters: of the whole model.
        trainer: configured threads of the trainer; None chooses by cores and model size.
        engine: configured threads of the engine; None as for the trainer.
        cores: cores of this machine; None counts them.
        environment: LOCAL_WORLD_SIZE is the number of ranks that share the cores, OMP_NUM_THREADS an upper limit.
    """
    cores = usable_cores() if cores is None else cores
    own = max(1, cores // int(environment.get("LOCAL_WORLD_SIZE", "1")))
    limit = environment.get("OMP_NUM_THREADS", "").split(",")[0]
    if limit.isdigit():
        own = max(1, min(own, int(limit)))

    def chosen(per_thread: int) -> int:
        return max(1, min(own, parameters // per_thread))

    return CpuThreads(
        trainer=trainer or chosen(PARAMETERS_PER_TRAINER_THREAD),
        engine=engine or chosen(PARAMETERS_PER_ENGINE_THREAD),
        cores=own,
    )


def limit_spinning(environment: MutableMapping[str, str] = os.environ) -> None:
    """Let OpenMP threads that wait for each other leave their cores to other programs. Call it before importing torch.

    GNU's OpenMP, which PyTorch uses on Linux, makes them spin for milliseconds. If other programs take cores, a thread
    that waits for another keeps it from running: on two busy cores an engine with 107 million parameters decoded at a
    fifth of the speed it reaches with this limit. Variables that the user has set take precedence.
    """
    if "OMP_WAIT_POLICY" not in environment:
        environment.setdefault("GOMP_SPINCOUNT", SPINS)


def usable_cores(quota_file: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """Physical cores that this process's affinity and its container's limit (cgroup v2) let it use."""
    import psutil  # only here, because every command imports this module

    cores = min(len(os.sched_getaffinity(0)), psutil.cpu_count(logical=False) or 1)
    if quota_file.exists():
        quota, period = quota_file.read_text().split()
        if quota != "max":
            cores = min(cores, max(1, int(quota) // int(period)))
    return cores


def has_bfloat16(cpu_information: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the CPU multiplies bfloat16 in hardware; if not, PyTorch is slower with it than with float32."""
    lines = (line.partition(":") for line in cpu_information.read_text().splitlines())
    flags = {flag for name, _, value in lines if name.strip() in ("flags", "Features") for flag in value.split()}
    return bool(flags & BFLOAT16_FLAGS)
