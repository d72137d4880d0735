"""Does a run fit, what does it cost, and which layouts would do: `dsrl plan`."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import get_args

from megatron_dsrl.config.layout import engine_problems, model_problems, process_problems
from megatron_dsrl.config.model import ParallelConfig, Recompute
from megatron_dsrl.config.phase import PhaseConfig
from megatron_dsrl.config.run import RunConfig
from megatron_dsrl.model.architecture import Architecture
from megatron_dsrl.planning.compute import Assumptions, generation_seconds, phase_flops, training_seconds
from megatron_dsrl.planning.fit import RunMemory, run_memory
from megatron_dsrl.planning.gpus import Gpu
from megatron_dsrl.planning.phases import phases_of

SIZES = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class PhaseCost:
    """One step of a phase."""

    name: str
    steps: int
    """That the run spends in it."""
    flops: float
    """Over all GPUs, all samples kept, at the mean response length."""
    seconds: float
    """Of its passes and updates."""


@dataclass(frozen=True)
class Plan:
    """A run on some GPUs."""

    config: RunConfig
    gpu: Gpu
    world_size: int
    memory: RunMemory
    phases: tuple[PhaseCost, ...]
    """That the run comes to, in order."""
    generation_seconds: float

    @property
    def fits(self) -> bool:
        """See `RunMemory`."""
        return self.memory.fits

    @property
    def training_seconds(self) -> float:
        """Of a step of the most expensive phase."""
        return max(phase.seconds for phase in self.phases)

    @property
    def step_seconds(self) -> float:
        """Generation and update in the most expensive phase."""
        return self._step(self.training_seconds)

    @property
    def run_seconds(self) -> float:
        """Of all steps."""
        return sum(phase.steps * self._step(phase.seconds) for phase in self.phases)

    def _step(self, training_seconds: float) -> float:
        """One after the other; with `rollout.sample_ahead` beside each other."""
        together = max if self.config.rollout.sample_ahead else sum
        return together((training_seconds, self.generation_seconds))


def make_plan(
    config: RunConfig, architecture: Architecture, gpu: Gpu, world_size: int, assumptions: Assumptions
) -> Plan:
    """Memory and time of a run whose layout is valid; see `is_valid`."""
    memory = run_memory(config, architecture, gpu.memory_bytes, world_size)

    def cost(phase: PhaseConfig, steps: int) -> PhaseCost:
        flops = phase_flops(config, architecture, phase, assumptions.mean_response_tokens)
        return PhaseCost(phase.name, steps, flops, training_seconds(flops, config, world_size, gpu, assumptions))

    return Plan(
        config=config,
        gpu=gpu,
        world_size=world_size,
        memory=memory,
        phases=tuple(cost(phase, steps) for phase, steps in phases_of(config)),
        generation_seconds=generation_seconds(architecture, config, world_size, gpu, memory.engine, assumptions),
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
    """The largest token budget of a micro-batch with which an update fits, to 1,024 tokens; None if none does."""
    return _largest(lambda tokens: _with_micro_batch(plan.config, tokens), plan, architecture)


def largest_response(plan: Plan, architecture: Architecture) -> int | None:
    """The longest response with which an update fits and the engine's cache holds one sequence, to 1,024 tokens; None
    if none does."""

    def changed(tokens: int) -> RunConfig:
        return plan.config.model_copy(
            update={"rollout": plan.config.rollout.model_copy(update={"max_response_tokens": tokens})}
        )

    return _largest(changed, plan, architecture)


def suggest(
    config: RunConfig, architecture: Architecture, gpu: Gpu, world_size: int, assumptions: Assumptions, count: int
) -> list[Plan]:
    """Layouts that fit, the fastest first by the estimate; among equals the one that splits the model least.

    Each with as little recomputation as fits. Where only the engine takes too much, its `memory_fraction` is lowered.
    """

    def plan_of(candidate: RunConfig) -> Plan:
        plan = make_plan(candidate, architecture, gpu, world_size, assumptions)
        fraction = plan.memory.largest_memory_fraction
        if plan.fits or not 0 < fraction < candidate.engine.memory_fraction:
            return plan
        engine = candidate.engine.model_copy(update={"memory_fraction": fraction})
        return make_plan(candidate.model_copy(update={"engine": engine}), architecture, gpu, world_size, assumptions)

    def with_least_recomputation(layout: RunConfig) -> Plan | None:
        modes = (layout.model.model_copy(update={"recompute": mode}) for mode in get_args(Recompute))
        plans = (plan_of(layout.model_copy(update={"model": model})) for model in modes)
        return next((plan for plan in plans if plan.fits), None)

    plans = map(with_least_recomputation, _layouts(config, architecture, world_size))
    fitting = [plan for plan in plans if plan is not None]
    return sorted(fitting, key=lambda plan: (_rounded(plan.step_seconds), _splitting(plan.config)))[:count]


def _layouts(config: RunConfig, architecture: Architecture, world_size: int) -> Iterator[RunConfig]:
    """Valid layouts within a node for tensor parallelism."""
    for tensor in SIZES[:4]:
        for pipeline in SIZES:
            for context in SIZES[:4]:
                for expert in SIZES if architecture.experts else (1,):
                    parallel = ParallelConfig(
                        tensor_parallel_size=tensor,
                        pipeline_parallel_size=pipeline,
                        **_uneven_ends(architecture.num_hidden_layers, pipeline),
                        context_parallel_size=context,
                        expert_parallel_size=expert,
                        expert_tensor_parallel_size=1 if expert > 1 else None,
                        sequence_parallel=tensor > 1,
                        distributed_optimizer=True,
                        collective_timeout_seconds=config.parallel.collective_timeout_seconds,
                    )
                    candidate = config.model_copy(update={"parallel": parallel})
                    if is_valid(candidate, architecture, world_size):
                        yield candidate


def _uneven_ends(layers: int, stages: int) -> dict[str, int]:
    """Layers of the first and the last stage where the stages cannot share the layers evenly: fewer than the others
    have, as these two have embedding and head too. Empty where they can, or where nothing would be left for the two."""
    between = -(-layers // stages)
    left = layers - between * (stages - 2)
    if stages == 1 or layers % stages == 0 or left < 2:
        return {}
    return {"layers_in_first_stage": left // 2, "layers_in_last_stage": left - left // 2}


def _largest(changed: Callable[[int], RunConfig], plan: Plan, architecture: Architecture) -> int | None:
    low, high = 0, 1024  # in units of 1,024 tokens
    while low < high:
        middle = (low + high + 1) // 2
        memory = run_memory(changed(middle * 1024), architecture, plan.gpu.memory_bytes, plan.world_size)
        if memory.peak_update <= memory.capacity and memory.holds_one_sequence:
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
