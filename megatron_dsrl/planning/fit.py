"""Peak memory of a run on a GPU, and whether it fits.

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
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from megatron_dsrl.algorithms.schedule import passes_of_run
from megatron_dsrl.config.run import RunConfig
from megatron_dsrl.model.architecture import Architecture
from megatron_dsrl.planning.host_memory import HostMemory, host_memory
from megatron_dsrl.planning.memory import (
    EngineMemory,
    TrainerMemory,
    critic_memory,
    element_bytes,
    engine_memory,
    largest_entry_bytes,
    optimizer_shards,
    policy_memory,
)

# None of these three has been measured; they are meant to be too large rather than too small.
RESERVE_BYTES = 4 * 2**30
ENGINE_WORK_BYTES = 5 * 2**30
"""Assumed memory of the engine besides weights and cache while it samples: its CUDA context, CUDA graphs, attention
work space, activations of a chunk of prompts. By default SGLang reserves 10 GiB or more of an 80 GB GPU for them."""
ENGINE_RELEASED_BYTES = 3 * 2**30
"""Assumed memory that the engine keeps after it has released weights and cache: its CUDA context, CUDA graphs, and
buffers."""


@dataclass(frozen=True)
class RunMemory:
    """Memory of every GPU, and of its process on the host. Unit: bytes."""

    config: RunConfig
    capacity: int
    """Memory of a GPU."""
    stages: Sequence[tuple[TrainerMemory, ...]]
    """The models on each pipeline stage: the policy, and the critic if there is one."""
    engine: EngineMemory
    """On the trainer's GPUs, or with `engine.urls` on other GPUs of the same kind."""
    largest_entry: int
    """Largest entry that is pushed whole to the engine: a bucket is at least as large."""
    gathered_on_device: tuple[int, ...]
    """By pipeline stage: upper bound of what a process receives there for a checkpoint from the other shards of the
    distributed optimizer."""
    host: HostMemory

    @property
    def policy(self) -> list[TrainerMemory]:
        """By pipeline stage."""
        return [stage[0] for stage in self.stages]

    @property
    def critic(self) -> list[TrainerMemory]:
        """By pipeline stage; empty without a critic."""
        return [stage[1] for stage in self.stages if len(stage) > 1]

    def resident_without(self, parts: Collection[str]) -> int:
        """The models' memory on the fullest GPU while these parts of them are on the host."""
        return max(sum(memory.resident - memory.of_parts(parts) for memory in stage) for stage in self.stages)

    @property
    def resident_while_sampling(self) -> int:
        """The models' memory on the fullest GPU while the engine samples."""
        return self.resident_without(self.config.actor.offload.parts)

    @property
    def engines_elsewhere(self) -> bool:
        """Whether no engine is on the trainer's devices: they are servers elsewhere, or nothing is sampled."""
        return bool(self.config.engine.urls) or not self.config.rollout.needs_engines

    @property
    def peak_update(self) -> int:
        """Peak of the fullest GPU while policy or critic is updated."""
        needed = (sum(one.resident for one in stage) + max(one.passing for one in stage) for stage in self.stages)
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
        models = (sum(memory.resident - memory.gradients for memory in stage) for stage in self.stages)
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
    models = [policy_memory, critic_memory] if passes_of_run(config.phases, config.steps).values else [policy_memory]
    stages = [
        tuple(memory_of(config, architecture, world_size, stage) for memory_of in models)
        for stage in range(config.parallel.pipeline_parallel_size)
    ]
    return RunMemory(
        config=config,
        capacity=capacity,
        stages=stages,
        engine=engine_memory(config, architecture, capacity),
        largest_entry=largest_entry_bytes(config, architecture),
        gathered_on_device=tuple(max(_gathered(one, config, world_size) for one in stage) for stage in stages),
        host=host_memory(config, architecture, world_size, stages),
    )


def _gathered(memory: TrainerMemory, config: RunConfig, world_size: int) -> int:
    """GPU memory of Megatron's `get_parameter_state_dp_zero`: this process's shard of the weights or of a moment, and
    the shards of all processes, in the tensors that receive them and in the buffer from which `all_gather` copies. An
    upper bound with experts, which are gathered after the other parameters."""
    shards, parameters = optimizer_shards(config.parallel, world_size), memory.trained // element_bytes(config.model)
    on_device = shards > 1 and config.checkpoint.gather_optimizer_on == "device"
    return 4 * parameters * 2 + 4 * parameters // shards if on_device else 0


def gib(size: int) -> str:
    """A size in bytes as text, such as `1.5 GiB`."""
    return f"{size / 2**30:.1f} GiB"
