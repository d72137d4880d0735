"""What of a run's memory lies on a GPU and on its host at the same time, and whether there is room for it.

A step has three phases on every GPU, and the engine's memory is given back while the models are updated:

- generation: weights, gradients and optimizer state of policy and critic; the engine's weights, cache and work space;
- update: the same of policy and critic, and the activations of the model that is being updated;
- switch: weights go to the engine in buckets; its weights lie there, and its cache not yet.

With `engine.urls` the engines are on other devices, and only the update counts.

What `actor.offload` moves to the host is not on the GPU during generation. It mostly is not during the switch either,
but in a step with a checkpoint or an export, and so in the last one, the trainer is whole then (device_sharing.py).

Not counted: the CUDA context, what the allocator cannot reuse, and NCCL's buffers; `RESERVE_BYTES` stands for them.
"""

from collections.abc import Collection
from dataclasses import dataclass

from megatron_dsrl.config.run import RunConfig
from megatron_dsrl.model.architecture import Architecture
from megatron_dsrl.planning.memory import (
    EngineMemory,
    TrainerMemory,
    critic_memory,
    engine_memory,
    largest_entry_bytes,
    policy_memory,
    routed_experts_bytes,
)
from megatron_dsrl.planning.phases import other_models

RESERVE_BYTES = 3 * 2**30
ENGINE_WORK_BYTES = 3 * 2**30
"""What the engine takes beside weights and cache while it samples: CUDA graphs, work space of attention, activations of
a chunk of prompts. Assumed; left to itself SGLang leaves 10 GiB or more of an 80 GB GPU to them."""


@dataclass(frozen=True)
class RunMemory:
    """Bytes of every GPU, by pipeline stage, and of its process on the host."""

    config: RunConfig
    capacity: int
    """Of a GPU."""
    policy: tuple[TrainerMemory, ...]
    """By pipeline stage."""
    critic: tuple[TrainerMemory, ...]
    """By pipeline stage; empty without a critic."""
    engine: EngineMemory
    """On GPUs like the trainer's; with `engine.urls` not on these."""
    largest_entry: int
    """Of what travels whole to the engine: a bucket is at least as large."""
    reference_on_host: tuple[int, ...]
    """By pipeline stage: the reference policy's weights, in page-locked memory; 0 without one."""
    checkpoint_on_host: tuple[int, ...]
    """By pipeline stage: at most so much of the process's weights and optimizer state is copied for an asynchronous
    checkpoint. (Replicas share the writing, so that with data parallelism it is less.)"""
    routed_experts_on_host: int
    """With `rollout.routing_replay`: the experts of a step's tokens, which every process has; at most."""

    @property
    def _models(self) -> list[tuple[TrainerMemory, ...]]:
        """By pipeline stage, the models that are there."""
        return list(zip(*([self.policy, self.critic] if self.critic else [self.policy])))

    def resident_without(self, parts: Collection[str]) -> int:
        """Of the fullest GPU: what the models keep there while these of their parts are on the host."""
        return max(sum(memory.resident - memory.of_parts(parts) for memory in stage) for stage in self._models)

    @property
    def resident_while_sampling(self) -> int:
        """Of the fullest GPU: what the models keep there while the engine samples."""
        return self.resident_without(self.config.actor.offload.parts)

    @property
    def offloaded_on_host(self) -> tuple[int, ...]:
        """By stage: copies of what moves to the host. Gradients are not kept."""
        kept = [part for part in self.config.actor.offload.parts if part != "gradients"]
        return tuple(sum(memory.of_parts(kept) for memory in stage) for stage in self._models)

    @property
    def on_host(self) -> int:
        """Of the process that needs the most host memory."""
        by_stage = zip(self.reference_on_host, self.checkpoint_on_host, self.offloaded_on_host)
        return max(map(sum, by_stage)) + self.routed_experts_on_host

    @property
    def engines_elsewhere(self) -> bool:
        """The engines are servers on other devices."""
        return bool(self.config.engine.urls)

    @property
    def peak_update(self) -> int:
        """Of the fullest GPU while policy or critic is updated."""
        needed = (sum(one.resident for one in stage) + max(one.passing for one in stage) for stage in self._models)
        return max(needed) + RESERVE_BYTES

    @property
    def sync_buckets(self) -> int:
        """Of the weight push: a bucket as it was gathered and as it is handed over; where tensors are split also the
        shards of all ranks, and the bucket before, while the next one is put together (weights/stream.py)."""
        at_a_time = 4 if self.config.parallel.tensor_parallel_size > 1 else 2
        return at_a_time * max(self.config.engine.weight_bucket_megabytes * 2**20, self.largest_entry)

    @property
    def peak_switch(self) -> int:
        """Of the fullest GPU while weights are pushed, in a step with a checkpoint."""
        return self.resident_without(()) + self.engine.weights + self.sync_buckets + RESERVE_BYTES

    @property
    def peak_generation(self) -> int:
        """Of the fullest GPU while the engine samples and the models wait."""
        return self.resident_while_sampling + self.engine.total + ENGINE_WORK_BYTES + RESERVE_BYTES

    @property
    def peaks(self) -> dict[str, int]:
        """By what happens then."""
        if self.engines_elsewhere:
            return {"an update": self.peak_update}
        return {
            "an update": self.peak_update,
            "the switch (weight push)": self.peak_switch,
            "generation": self.peak_generation,
        }

    @property
    def holds_one_sequence(self) -> bool:
        """The engine's cache has room for the longest sequence, as far as the plan can know."""
        return self.engines_elsewhere or self.engine.cache_tokens >= self._longest_sequence

    @property
    def largest_memory_fraction(self) -> float:
        """The largest `engine.memory_fraction` with which generation fits, to 0.01; 0 if none does."""
        left = self.capacity - self.resident_while_sampling - ENGINE_WORK_BYTES - RESERVE_BYTES
        return max(0, left * 100 // self.capacity) / 100

    @property
    def _longest_sequence(self) -> int:
        return self.config.data.max_prompt_tokens + self.config.rollout.max_response_tokens

    @property
    def problems(self) -> list[str]:
        """In words, what does not fit and what would help; empty if everything fits."""
        advice = {
            "an update": "lower actor.max_tokens_per_micro_batch or rollout.max_response_tokens, set "
            "model.recompute=full, or split the model further (section parallel)",
            "the switch (weight push)": "split the model further (section parallel), or raise "
            "engine.tensor_parallel_size",
            "generation": "lower engine.memory_fraction, move parts of the trainer to the host (actor.offload), or "
            "split the model further (section parallel)",
        }
        too_large = [
            f"{what} takes {_gib(peak)} of the {_gib(self.capacity)} of a GPU; {advice[what]}"
            for what, peak in self.peaks.items()
            if peak > self.capacity
        ]
        if not self.holds_one_sequence:
            too_large.append(
                f"the engine's cache holds {self.engine.cache_tokens:,} tokens, less than one longest sequence of "
                f"{self._longest_sequence:,}; raise engine.memory_fraction or engine.tensor_parallel_size"
            )
        return too_large

    @property
    def fits(self) -> bool:
        """Every phase fits into the GPU, and the engine has room for one longest sequence."""
        return not self.problems


def run_memory(config: RunConfig, architecture: Architecture, capacity: int, world_size: int) -> RunMemory:
    """Of a run whose layout is valid.

    Args:
        config: the run.
        architecture: its model.
        capacity: bytes of a GPU.
        world_size: number of GPUs.
    """
    stages = range(config.parallel.pipeline_parallel_size)
    others = other_models(config)
    policy = tuple(policy_memory(config, architecture, world_size, stage) for stage in stages)
    critic = tuple(critic_memory(config, architecture, world_size, stage) for stage in stages) if others.critic else ()
    copied = [policy, critic] if config.checkpoint.asynchronous else []
    return RunMemory(
        config=config,
        capacity=capacity,
        policy=policy,
        critic=critic,
        engine=engine_memory(config, architecture, capacity),
        largest_entry=largest_entry_bytes(config, architecture),
        reference_on_host=tuple(stage.weights if others.reference else 0 for stage in policy),
        checkpoint_on_host=tuple(
            sum(model[stage].weights + model[stage].optimizer for model in copied if model) for stage in stages
        ),
        routed_experts_on_host=routed_experts_bytes(config, architecture),
    )


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
