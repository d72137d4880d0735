"""Does a run fit, what does it cost, and which layouts would do: `dsrl plan`."""

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_dsrl.config.layout import engine_problems, model_problems, process_problems
from megatron_dsrl.config.model import ParallelConfig
from megatron_dsrl.config.run import RunConfig
from megatron_dsrl.model.architecture import Architecture
from megatron_dsrl.planning.compute import Assumptions, generation_seconds, training_flops, training_seconds
from megatron_dsrl.planning.gpus import Gpu
from megatron_dsrl.planning.memory import (
    RESERVE_BYTES,
    EngineMemory,
    TrainerMemory,
    engine_memory,
    trainer_memory,
)

SIZES = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class Plan:
    """A run on some GPUs."""

    config: RunConfig
    gpu: Gpu
    world_size: int
    stages: tuple[TrainerMemory, ...]
    """The trainer's memory by pipeline stage."""
    engine: EngineMemory
    training_flops: float
    """Of one step, all samples kept, at the mean response length."""
    training_seconds: float
    generation_seconds: float

    @property
    def peak_training(self) -> int:
        """Bytes of the fullest GPU during an update; the engine has given its memory back."""
        return max(stage.training for stage in self.stages) + RESERVE_BYTES

    @property
    def peak_switch(self) -> int:
        """Bytes while weights are pushed: the trainer's, the engine's, and a bucket on either side."""
        bucket = 2 * self.config.engine.weight_bucket_megabytes * 2**20
        return max(stage.resident for stage in self.stages) + self.engine.weights + bucket + RESERVE_BYTES

    @property
    def peak_generation(self) -> int:
        """Bytes while the engine samples and the trainer waits."""
        return max(stage.resident for stage in self.stages) + self.engine.total + RESERVE_BYTES

    @property
    def fits(self) -> bool:
        """Every phase fits into the GPU, and the engine has room for one longest sequence."""
        longest = self.config.data.max_prompt_tokens + self.config.rollout.max_response_tokens
        peak = max(self.peak_training, self.peak_switch, self.peak_generation)
        return peak <= self.gpu.memory_bytes and self.engine.cache_tokens >= longest

    @property
    def step_seconds(self) -> float:
        """Generation and update, one after the other."""
        return self.training_seconds + self.generation_seconds


def make_plan(
    config: RunConfig, architecture: Architecture, gpu: Gpu, world_size: int, assumptions: Assumptions
) -> Plan:
    """Memory and time of a run whose layout is valid; see `is_valid`."""
    stages = range(config.parallel.pipeline_parallel_size)
    engine = engine_memory(config, architecture, gpu.memory_bytes)
    samples = config.rollout.prompts_per_step * config.rollout.samples_per_prompt
    one = training_flops(
        architecture,
        config.data.max_prompt_tokens,
        assumptions.mean_response_tokens,
        recompute_full=config.model.recompute == "full",
    )
    flops = one * samples * config.actor.epochs_per_rollout
    return Plan(
        config=config,
        gpu=gpu,
        world_size=world_size,
        stages=tuple(trainer_memory(config, architecture, world_size, stage) for stage in stages),
        engine=engine,
        training_flops=flops,
        training_seconds=training_seconds(flops, config, world_size, gpu, assumptions),
        generation_seconds=generation_seconds(architecture, config, world_size, gpu, engine, assumptions),
    )


def is_valid(config: RunConfig, architecture: Architecture, world_size: int) -> bool:
    """The processes and the model divide into the layout."""
    problems = [
        *process_problems(config.parallel, world_size),
        *model_problems(config.parallel, architecture.shape),
        *engine_problems(config.engine.tensor_parallel_size, world_size, architecture.shape),
    ]
    return not problems


def largest_micro_batch(plan: Plan, architecture: Architecture) -> int | None:
    """The largest token budget of a micro-batch with which training fits, to 1,024 tokens; None if none does."""
    return _largest(lambda tokens: _with_micro_batch(plan.config, tokens), plan, architecture)


def largest_response(plan: Plan, architecture: Architecture) -> int | None:
    """The longest response with which every phase fits, to 1,024 tokens; None if none does."""

    def changed(tokens: int) -> RunConfig:
        return plan.config.model_copy(
            update={"rollout": plan.config.rollout.model_copy(update={"max_response_tokens": tokens})}
        )

    return _largest(changed, plan, architecture)


def suggest(
    config: RunConfig, architecture: Architecture, gpu: Gpu, world_size: int, assumptions: Assumptions, count: int
) -> list[Plan]:
    """Layouts that fit, the fastest first by the estimate; among equals the one that splits the model least."""
    plans = [
        make_plan(candidate, architecture, gpu, world_size, assumptions)
        for candidate in _layouts(config, architecture, world_size)
    ]
    fitting = [plan for plan in plans if plan.fits]
    return sorted(fitting, key=lambda plan: (_rounded(plan.step_seconds), _splitting(plan.config)))[:count]


def _layouts(config: RunConfig, architecture: Architecture, world_size: int) -> Iterator[RunConfig]:
    """Valid layouts within a node for tensor parallelism, with every mode of recomputation."""
    for tensor in SIZES[:4]:
        for pipeline in SIZES:
            for context in SIZES[:4]:
                for expert in SIZES if architecture.experts else (1,):
                    parallel = ParallelConfig(
                        tensor_parallel_size=tensor,
                        pipeline_parallel_size=pipeline,
                        context_parallel_size=context,
                        expert_parallel_size=expert,
                        expert_tensor_parallel_size=1 if expert > 1 else None,
                        sequence_parallel=tensor > 1,
                        distributed_optimizer=True,
                        collective_timeout_seconds=config.parallel.collective_timeout_seconds,
                    )
                    for recompute in ("none", "full"):
                        model = config.model.model_copy(update={"recompute": recompute})
                        candidate = config.model_copy(update={"parallel": parallel, "model": model})
                        if is_valid(candidate, architecture, world_size):
                            yield candidate


def _largest(changed, plan: Plan, architecture: Architecture) -> int | None:
    low, high = 0, 1024  # in units of 1,024 tokens
    while low < high:
        middle = (low + high + 1) // 2
        config = changed(middle * 1024)
        stages = range(config.parallel.pipeline_parallel_size)
        training = max(trainer_memory(config, architecture, plan.world_size, stage).training for stage in stages)
        longest = config.data.max_prompt_tokens + config.rollout.max_response_tokens
        if training + RESERVE_BYTES <= plan.gpu.memory_bytes and longest <= plan.engine.cache_tokens:
            low = middle
        else:
            high = middle - 1
    return low * 1024 or None


def _with_micro_batch(config: RunConfig, tokens: int) -> RunConfig:
    return config.model_copy(
        update={"actor": config.actor.model_copy(update={"max_tokens_per_micro_batch": tokens})}
    )


def _rounded(seconds: float) -> float:
    """To two digits: finer differences are below what the estimate can tell."""
    return float(f"{seconds:.2g}")


def _splitting(config: RunConfig) -> tuple[int, int, int, int]:
    parallel = config.parallel
    return (
        parallel.model_parallel_size,
        parallel.pipeline_parallel_size,
        parallel.context_parallel_size,
        parallel.expert_parallel_size,
    )
