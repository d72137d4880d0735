"""Memory warnings at the start of a run, for the machine on which it starts.

On GPUs the plan is compared with the memory of each GPU, and of the host. On a CPU all processes and engines share the
machine's memory; about 1.5 GB per process and engine for the programs themselves are not included.
"""

import os
from dataclasses import dataclass
from typing import Literal

import psutil

from megatron_dsrl.config.run import RunConfig
from megatron_dsrl.model.architecture import read_architecture
from megatron_dsrl.model.source import find_config_json
from megatron_dsrl.planning.fit import RunMemory, gib, run_memory
from megatron_dsrl.platform import current_platform

ADVICE = "it starts anyway; see examples/troubleshooting: out of memory"


@dataclass(frozen=True)
class Machine:
    """The host of this process."""

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
        problems = list(_cpu_problems(memory, machine))
    return [f"warning: according to `dsrl plan` this run does not fit: {problem} ({ADVICE})" for problem in problems]


def _host_problems(memory: RunMemory, machine: Machine) -> list[str]:
    total = machine.processes * (memory.on_host + memory.pinned_on_host)  # which may be up to twice as large
    if total <= machine.host_bytes:
        return []
    return [
        "reference policy, offloaded parts, replayed experts and "
        f"checkpoint copies of {machine.processes} process(es) take up to "
        f"{gib(total)} of the {gib(machine.host_bytes)} of this host; set checkpoint.asynchronous=false, or "
        "offload less (actor.offload)"
    ]


def _cpu_problems(memory: RunMemory, machine: Machine) -> list[str]:
    passing = [stage.passing for stage in (*memory.policy, *memory.critic)]
    per_process = memory.resident_without(()) + max(passing) + memory.on_host
    engines = 0 if memory.engines_elsewhere else machine.processes / memory.config.engine.tensor_parallel_size
    per_engine = memory.config.engine.tensor_parallel_size * memory.engine.used
    total = int(machine.processes * per_process + engines * per_engine)
    if total <= machine.host_bytes:
        return []
    return [
        f"{machine.processes} process(es) with their engines take {gib(total)} of the {gib(machine.host_bytes)} of "
        "this machine; lower actor.max_tokens_per_micro_batch or engine.max_total_tokens, or take a smaller model"
    ]
