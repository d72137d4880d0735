"""Whether a run fits, what a step costs, and what the run leaves on disk. layouts.py searches for layouts that fit."""

from dataclasses import dataclass

from megatron_dsrl.algorithms.schedule import passes_of_run
from megatron_dsrl.config.model import ParallelConfig
from megatron_dsrl.config.phase import PhaseSteps, phases_by_steps
from megatron_dsrl.config.run import Due, RunConfig
from megatron_dsrl.model.architecture import Architecture
from megatron_dsrl.planning.compute import Assumptions, generation_seconds, phase_flops, training_seconds
from megatron_dsrl.planning.fit import RunMemory, run_memory
from megatron_dsrl.planning.gpus import Gpu
from megatron_dsrl.planning.memory import adam_bytes, element_bytes
from megatron_dsrl.planning.parameters import (
    adapter_parameters_of_stage,
    parameters_of_critic_stage,
    parameters_of_model,
)


@dataclass(frozen=True)
class PhaseCost:
    """Cost of one step of a phase; of the most expensive one, if a custom phase changes from step to step."""

    name: str
    steps: int
    """Number of steps that the run spends in the phase."""
    flops: float
    """Operations over all GPUs, if all samples are kept, at the mean response length."""
    seconds: float
    """Seconds of passes and updates."""


@dataclass(frozen=True)
class Plan:
    """A run on a number of GPUs."""

    config: RunConfig
    gpu: Gpu
    world_size: int
    memory: RunMemory
    phases: tuple[PhaseCost, ...]
    """Phases that the run reaches, in order."""
    generation_seconds: float

    @property
    def fits(self) -> bool:
        return self.memory.fits

    @property
    def training_seconds(self) -> float:
        """Update seconds of a step of the most expensive phase."""
        return max(phase.seconds for phase in self.phases)

    @property
    def step_seconds(self) -> float:
        """The same with generation."""
        return self._step(self.training_seconds)

    @property
    def run_seconds(self) -> float:
        return sum(phase.steps * self._step(phase.seconds) for phase in self.phases)

    def _step(self, training_seconds: float) -> float:
        """Generation and update one after the other, or concurrently with `rollout.max_staleness`."""
        together = max if self.config.rollout.max_staleness else sum
        return together((training_seconds, self.generation_seconds))


def make_plan(
    config: RunConfig, architecture: Architecture, gpu: Gpu, world_size: int, assumptions: Assumptions
) -> Plan:
    """Memory and time of a run whose layout is valid; see `layouts.layout_problems`."""
    memory = run_memory(config, architecture, gpu.memory_bytes, world_size)

    def cost(phase: PhaseSteps) -> PhaseCost:
        flops = max(phase_flops(config, architecture, form, assumptions.mean_response_tokens) for form in phase.forms)
        return PhaseCost(phase.name, phase.steps, flops, training_seconds(flops, config, world_size, gpu, assumptions))

    return Plan(
        config=config,
        gpu=gpu,
        world_size=world_size,
        memory=memory,
        phases=tuple(cost(phase) for phase in phases_by_steps(config.phases, config.steps) if phase.steps),
        generation_seconds=generation_seconds(architecture, config, world_size, gpu, memory.engine, assumptions),
    )


def largest_micro_batch(plan: Plan, architecture: Architecture) -> int | None:
    """The largest token budget of a micro-batch with which an update fits, in steps of 1,024; None if none does."""
    return _largest("actor", "max_tokens_per_micro_batch", plan, architecture)


def largest_response(plan: Plan, architecture: Architecture) -> int | None:
    """The longest response with which an update fits and the engine's cache holds one sequence, in steps of 1,024
    tokens; None if none does."""
    return _largest("rollout", "max_response_tokens", plan, architecture)


def _largest(section: str, field: str, plan: Plan, architecture: Architecture) -> int | None:
    low, high = 0, 1024  # in units of 1,024 tokens
    while low < high:
        middle = (low + high + 1) // 2
        changed = plan.config.with_fields(section, **{field: middle * 1024})
        memory = run_memory(changed, architecture, plan.gpu.memory_bytes, plan.world_size)
        if memory.peak_update <= memory.capacity and memory.holds_one_sequence:
            low = middle
        else:
            high = middle - 1
    return low * 1024 or None


@dataclass(frozen=True)
class RunFiles:
    """Number of the largest files at the end of a run, and the bytes of each."""

    checkpoints: int
    """Those that are kept, plus the next one, which is written before the oldest is removed."""
    checkpoint_bytes: int
    exports: int
    export_bytes: int


def run_files(config: RunConfig, architecture: Architecture) -> RunFiles:
    """Checkpoints and exports of a whole run. Samples and logs are not counted."""
    due, element = Due(config), element_bytes(config.model)
    steps = range(1, config.steps + 1)
    saved = [step for step in steps if due.save(step)]
    keep_every = config.checkpoint.keep_every_steps
    always = sum(keep_every is not None and step % keep_every == 0 for step in saved)
    whole, trained = ParallelConfig(), parameters_of_model(architecture)
    if config.actor.lora:
        trained = adapter_parameters_of_stage(architecture, whole, 0, config.actor.lora).total
    if passes_of_run(config.phases, config.steps).values:
        trained += parameters_of_critic_stage(architecture, whole, 0).total
    return RunFiles(
        checkpoints=min(len(saved), config.checkpoint.keep_last + always + 1),
        checkpoint_bytes=trained * (element + adam_bytes(config.model)),
        exports=sum(due.export(step) for step in steps),
        export_bytes=parameters_of_model(architecture) * element,
    )
