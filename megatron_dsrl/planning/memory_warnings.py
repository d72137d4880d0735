"""What a run warns of at its start: the parts of it that do not fit according to the plan.

On a CPU all processes and engines share the machine's memory; about 1.5 GB per process and engine for the programs
themselves are not included.
"""

import os
from dataclasses import dataclass
from typing import Literal

import psutil

from megatron_dsrl.common.numbers import counted
from megatron_dsrl.config.run import RunConfig
from megatron_dsrl.model.architecture import read_architecture
from megatron_dsrl.model.source import find_config_json
from megatron_dsrl.planning.fit import RunMemory, gib, run_memory
from megatron_dsrl.platform import current_platform

ADVICE = "it starts anyway; see examples/troubleshooting: out of memory"


@dataclass(frozen=True)
class Machine:
    """The host of this process, for warnings at the start of a run."""

    platform: Literal["cpu", "cuda"]
    device_bytes: int
    """Memory of one GPU; on CPU, of the host."""
    host_bytes: int
    processes: int
    """Number of the run's processes on this host."""


def this_machine() -> Machine:
    """The machine of this process. Under torchrun and SLURM, LOCAL_WORLD_SIZE is the number of processes."""
    platform = current_platform()
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return Machine(platform.name, platform.memory_bytes, psutil.virtual_memory().total, processes)


def memory_warnings(config: RunConfig, world_size: int, machine: Machine) -> list[str]:
    """One message for each part that does not fit according to the plan; empty if everything fits.

    Raises:
        UserError: see `read_architecture`.
    """
    architecture = read_architecture(find_config_json(config.model.path, config.made_by).parent)
    memory = run_memory(config, architecture, machine.device_bytes, world_size)
    if machine.platform == "cuda":
        problems = [*memory.problems, *_host_problems(memory, machine)]
    else:
        problems = _cpu_problems(memory, machine)
    return [f"warning: according to `dsrl plan` this run does not fit: {problem} ({ADVICE})" for problem in problems]


def _host_problems(memory: RunMemory, machine: Machine) -> list[str]:
    total = machine.processes * (memory.host.total + memory.host.pinned)  # which may be up to twice as large
    if total <= machine.host_bytes:
        return []
    return [
        "reference policy, offloaded parts, replayed experts and "
        f"checkpoint copies of {counted(machine.processes, 'process')} take up to "
        f"{gib(total)} of the {gib(machine.host_bytes)} of this host; set checkpoint.asynchronous=false, or "
        "offload less (actor.offload)"
    ]


def _cpu_problems(memory: RunMemory, machine: Machine) -> list[str]:
    passing = max(model.passing for stage in memory.stages for model in stage)
    per_process = memory.resident_without(()) + passing + memory.host.total
    engines = 0 if memory.engines_elsewhere else machine.processes / memory.config.engine.tensor_parallel_size
    per_engine = memory.config.engine.tensor_parallel_size * memory.engine.used
    total = int(machine.processes * per_process + engines * per_engine)
    if total <= machine.host_bytes:
        return []
    return [
        f"{counted(machine.processes, 'process')} and the engines take {gib(total)} of the {gib(machine.host_bytes)} "
        "of this machine; lower actor.max_tokens_per_micro_batch or engine.max_total_tokens, or use a smaller model"
    ]
