"""Peak memory of a run on a GPU and on its host, and whether it fits.

A step has three phases on every GPU, and a fourth if it saves a checkpoint; the engine's memory is released while the
models are updated:

- generation: weights, gradients and optimizer state of policy and critic; the engine's weights, cache and work space;
- update: the same of policy and critic, and the activations of the model that is being updated; what a released engine
  keeps;
- switch: weights go to the engine in buckets; the engine has its weights, but not yet its cache;
- checkpoint: like the switch, but without gradients and buckets, and with what Megatron gathers of the optimizer's
  state.

With `engine.urls` the engines are on other devices, and only update and checkpoint count.

Parts that `actor.offload` moves to the host are not on the GPU during generation. Usually they are not there during the
switch either, except in a step with a checkpoint or an export, such as the last one (device_sharing.py).

Not counted: the CUDA context, memory that the allocator cannot reuse, and NCCL's buffers; `RESERVE_BYTES` covers them.

On a CPU all processes and engines share the machine's memory; about 1.5 GB per process and engine for the programs
themselves are not included.
"""

import os
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

import psutil

from megatron_dsrl.algorithms.schedule import passes_of_run
from megatron_dsrl.common.numbers import counted
from megatron_dsrl.config.run import RunConfig
from megatron_dsrl.model.architecture import Architecture, read_architecture
from megatron_dsrl.model.source import find_config_json
from megatron_dsrl.planning.memory import (
    EngineMemory,
    TrainerMemory,
    critic_memory,
    element_bytes,
    engine_memory,
    largest_entry_bytes,
    policy_memory,
    routed_experts_bytes,
)
from megatron_dsrl.platform import current_platform

# None of these three has been measured; they are meant to be too large rather than too small.
RESERVE_BYTES = 4 * 2**30
ENGINE_WORK_BYTES = 5 * 2**30
"""Assumed memory of the engine besides weights and cache while it samples: its CUDA context, CUDA graphs, attention
work space, activations of a chunk of prompts. By default SGLang reserves 10 GiB or more of an 80 GB GPU for them."""
ENGINE_RELEASED_BYTES = 3 * 2**30
"""Assumed memory that the engine keeps after it has released weights and cache: its CUDA context, CUDA graphs, and
buffers."""
ADVICE = "it starts anyway; see examples/troubleshooting: out of memory"


@dataclass(frozen=True)
class RunMemory:
    """Memory of every GPU, by pipeline stage, and of its process on the host. Unit: bytes."""

    config: RunConfig
    capacity: int
    """Memory of a GPU."""
    policy: tuple[TrainerMemory, ...]
    """By pipeline stage."""
    critic: tuple[TrainerMemory, ...]
    """By pipeline stage; empty without a critic."""
    engine: EngineMemory
    """On the trainer's GPUs, or with `engine.urls` on other GPUs of the same kind."""
    largest_entry: int
    """Largest entry that is pushed whole to the engine: a bucket is at least as large."""
    reference_on_host: tuple[int, ...]
    """By pipeline stage: the reference policy's weights, with LoRA its adapters, in page-locked memory; 0 without
    one."""
    checkpoint_on_host: tuple[int, ...]
    """By pipeline stage: upper bound of the weights and optimizer state that a process copies for an asynchronous
    checkpoint. (With data parallelism it is less, since replicas share the writing.)"""
    gathered_on_host: tuple[int, ...]
    """By pipeline stage: upper bound of what a process gathers for a checkpoint from the other shards of the
    distributed optimizer, synchronous or not; 0 without other shards."""
    gathered_on_device: tuple[int, ...]
    """By pipeline stage: the same on the GPU, where it is received."""
    routed_experts_on_host: int
    """With `rollout.routing_replay`: upper bound of the experts of a step's tokens, which every process has."""

    @property
    def _models(self) -> list[tuple[TrainerMemory, ...]]:
        """The models on each pipeline stage."""
        return list(zip(*([self.policy, self.critic] if self.critic else [self.policy])))

    def resident_without(self, parts: Collection[str]) -> int:
        """The models' memory on the fullest GPU while these parts of them are on the host."""
        return max(sum(memory.resident - memory.of_parts(parts) for memory in stage) for stage in self._models)

    @property
    def resident_while_sampling(self) -> int:
        """The models' memory on the fullest GPU while the engine samples."""
        return self.resident_without(self.config.actor.offload.parts)

    @property
    def offloaded_on_host(self) -> tuple[int, ...]:
        """Host copies of the offloaded parts, by stage. Gradients are dropped, not copied."""
        kept = [part for part in self.config.actor.offload.parts if part != "gradients"]
        return tuple(sum(memory.of_parts(kept) for memory in stage) for stage in self._models)

    @property
    def on_host(self) -> int:
        """Host memory of the process that needs the most."""
        checkpoint = zip(self.checkpoint_on_host, self.gathered_on_host)
        by_stage = zip(self.reference_on_host, map(sum, checkpoint), self.offloaded_on_host)
        return max(map(sum, by_stage)) + self.routed_experts_on_host

    @property
    def pinned_on_host(self) -> int:
        """The part of it that is page-locked on GPUs, where PyTorch rounds every block up to a power of two."""
        return max(map(sum, zip(self.reference_on_host, self.offloaded_on_host)))

    @property
    def engines_elsewhere(self) -> bool:
        """Whether no engine is on the trainer's devices: they are servers elsewhere, or nothing is sampled."""
        return bool(self.config.engine.urls) or not self.config.rollout.needs_engines

    @property
    def peak_update(self) -> int:
        """Peak of the fullest GPU while policy or critic is updated."""
        needed = (sum(one.resident for one in stage) + max(one.passing for one in stage) for stage in self._models)
        return max(needed) + self.engine_released + RESERVE_BYTES

    @property
    def engine_released(self) -> int:
        """What the engine keeps on the trainer's GPUs while it is released."""
        return 0 if self.engines_elsewhere else ENGINE_RELEASED_BYTES

    @property
    def sync_buckets(self) -> int:
        """Buckets of the weight push: one as gathered and one as sent; with split tensors also the shards of all ranks,
        and the previous bucket while the next one is assembled (weights/stream.py)."""
        at_a_time = 4 if self.config.parallel.tensor_parallel_size > 1 else 2
        return at_a_time * max(self.config.engine.weight_bucket_megabytes * 2**20, self.largest_entry)

    @property
    def peak_switch(self) -> int:
        """Peak of the fullest GPU while weights are pushed, in a step with a checkpoint."""
        engine = self.engine.weights + self.engine_released
        return self.resident_without(()) + engine + self.sync_buckets + RESERVE_BYTES

    @property
    def peak_checkpoint(self) -> int:
        """Peak of the fullest GPU while a checkpoint is saved."""
        models = (sum(memory.resident - memory.gradients for memory in stage) for stage in self._models)
        peak = max(map(sum, zip(models, self.gathered_on_device)))
        engine = 0 if self.engines_elsewhere else self.engine.weights
        return peak + engine + self.engine_released + RESERVE_BYTES

    @property
    def peak_generation(self) -> int:
        """Peak of the fullest GPU while the engine samples and the models wait."""
        return self.resident_while_sampling + self.engine.total + ENGINE_WORK_BYTES + RESERVE_BYTES

    @property
    def peaks(self) -> dict[str, int]:
        """Peak by phase."""
        if self.engines_elsewhere:
            return {"an update": self.peak_update, "a checkpoint": self.peak_checkpoint}
        return {
            "an update": self.peak_update,
            "the switch (weight push)": self.peak_switch,
            "generation": self.peak_generation,
            "a checkpoint": self.peak_checkpoint,
        }

    @property
    def holds_one_sequence(self) -> bool:
        """Whether the engine's cache has room for the longest sequence; True if its size is unknown."""
        return self.engines_elsewhere or self.engine.cache_tokens >= self.config.longest_sequence

    @property
    def largest_memory_fraction(self) -> float:
        """The largest `engine.memory_fraction` with which generation fits, in steps of 0.01; 0 if none does."""
        left = self.capacity - self.resident_while_sampling - ENGINE_WORK_BYTES - RESERVE_BYTES
        return max(0, left * 100 // self.capacity) / 100

    @property
    def problems(self) -> list[str]:
        """Messages about what does not fit and what would help; empty if everything fits."""
        advice = {
            "an update": "lower actor.max_tokens_per_micro_batch or rollout.max_response_tokens, set "
            "model.recompute=full, or split the model further (section parallel)",
            "the switch (weight push)": "split the model further (section parallel), or raise "
            "engine.tensor_parallel_size",
            "generation": "lower engine.memory_fraction, move parts of the trainer to the host (actor.offload), or "
            "split the model further (section parallel)",
            "a checkpoint": "set checkpoint.gather_optimizer_on=host, or split the model further (section parallel)",
        }
        too_large = [
            f"{what} takes {gib(peak)} of the {gib(self.capacity)} of a GPU; {advice[what]}"
            for what, peak in self.peaks.items()
            if peak > self.capacity
        ]
        if not self.holds_one_sequence:
            too_large.append(
                f"the engine's cache holds {self.engine.cache_tokens:,} tokens, less than one longest sequence of "
                f"{self.config.longest_sequence:,}; raise engine.memory_fraction or engine.tensor_parallel_size"
            )
        return too_large

    @property
    def fits(self) -> bool:
        """Whether every phase fits into the GPU, and the engine has room for the longest sequence."""
        return not self.problems


def run_memory(config: RunConfig, architecture: Architecture, capacity: int, world_size: int) -> RunMemory:
    """Memory of a run whose layout is valid; `capacity` is the memory of a GPU in bytes."""
    stages = range(config.parallel.pipeline_parallel_size)
    needed = passes_of_run(config.phases, config.steps)
    policy = tuple(policy_memory(config, architecture, world_size, stage) for stage in stages)
    critic = tuple(critic_memory(config, architecture, world_size, stage) for stage in stages) if needed.values else ()
    models = [policy, critic] if critic else [policy]
    copied = models if config.checkpoint.asynchronous else []
    reference = [stage.trained if config.reference.path is None else stage.weights for stage in policy]
    return RunMemory(
        config=config,
        capacity=capacity,
        policy=policy,
        critic=critic,
        engine=engine_memory(config, architecture, capacity),
        largest_entry=largest_entry_bytes(config, architecture),
        reference_on_host=tuple(weights if needed.reference_log_probs else 0 for weights in reference),
        checkpoint_on_host=tuple(
            sum(model[stage].trained + model[stage].optimizer for model in copied) for stage in stages
        ),
        gathered_on_host=tuple(
            sum(_gathered_on_host(model[stage], config, world_size) for model in models) for stage in stages
        ),
        gathered_on_device=tuple(
            max(_gathered_on_device(model[stage], config, world_size) for model in models) for stage in stages
        ),
        routed_experts_on_host=routed_experts_bytes(config, architecture),
    )


def _gathered_on_host(memory: TrainerMemory, config: RunConfig, world_size: int) -> int:
    """Host memory of Megatron's `get_parameter_state_dp_zero`: float32 weights and both moments of all trained
    parameters, this process's shard of them, and one of the three twice while it is received."""
    shards, parameters = _optimizer_shards(config, world_size), memory.trained // element_bytes(config.model)
    return 4 * parameters * (3 + 2) + 12 * parameters // shards if shards > 1 else 0


def _gathered_on_device(memory: TrainerMemory, config: RunConfig, world_size: int) -> int:
    """GPU memory of the same: this process's shard of the weights or of a moment, and the shards of all processes, in
    the tensors that receive them and in the buffer from which `all_gather` copies. An upper bound with experts, which
    are gathered after the other parameters."""
    shards, parameters = _optimizer_shards(config, world_size), memory.trained // element_bytes(config.model)
    on_device = shards > 1 and config.checkpoint.gather_optimizer_on == "device"
    return 4 * parameters * 2 + 4 * parameters // shards if on_device else 0


def _optimizer_shards(config: RunConfig, world_size: int) -> int:
    """Processes that share the optimizer state of the same parameters; 1 without the distributed optimizer."""
    parallel = config.parallel
    shards = world_size // (parallel.tensor_parallel_size * parallel.pipeline_parallel_size)
    return shards if parallel.distributed_optimizer else 1


def gib(size: int) -> str:
    """A size in bytes as text, such as `1.5 GiB`."""
    return f"{size / 2**30:.1f} GiB"


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
    total = machine.processes * (memory.on_host + memory.pinned_on_host)  # which may be up to twice as large
    if total <= machine.host_bytes:
        return []
    return [
        "reference policy, offloaded parts, replayed experts and "
        f"checkpoint copies of {counted(machine.processes, 'process')} take up to "
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
        f"{counted(machine.processes, 'process')} and the engines take {gib(total)} of the {gib(machine.host_bytes)} "
        "of this machine; lower actor.max_tokens_per_micro_batch or engine.max_total_tokens, or use a smaller model"
    ]
