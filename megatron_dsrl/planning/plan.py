"""Whether a run fits, what a step costs, and what the run leaves on disk. layouts.py searches for layouts that fit."""

from bisect import bisect_left
from dataclasses import dataclass

from megatron_dsrl.algorithms.schedule import passes_of_run
from megatron_dsrl.config.model import ParallelConfig
from megatron_dsrl.config.phase import PhaseSteps, phases_by_steps
from megatron_dsrl.config.run import Due, RunConfig
from megatron_dsrl.model.architecture import Architecture
from megatron_dsrl.planning.compute import generation_seconds, phase_flops, training_seconds
from megatron_dsrl.planning.fit import RunMemory, run_memory
from megatron_dsrl.planning.memory import adam_bytes, element_bytes
from megatron_dsrl.planning.parameters import (
    adapter_parameters_of_stage,
    parameters_of_critic_stage,
    parameters_of_model,
)
from megatron_dsrl.planning.planned_run import PlannedRun


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
    """Memory and time of a run."""

    run: PlannedRun
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
        together = max if self.run.config.rollout.max_staleness else sum
        return together((training_seconds, self.generation_seconds))


def make_plan(run: PlannedRun) -> Plan:
    """Memory and time of a run whose layout is valid; see `layouts.layout_problems`."""

    def cost(phase: PhaseSteps) -> PhaseCost:
        flops = max(phase_flops(run, form) for form in phase.forms)
        return PhaseCost(phase.name, phase.steps, flops, training_seconds(run, flops))

    memory, phases = _memory(run), phases_by_steps(run.config.phases, run.config.steps)
    costs = tuple(cost(phase) for phase in phases if phase.steps)
    return Plan(run, memory, costs, generation_seconds(run, memory.engine))


def _memory(run: PlannedRun) -> RunMemory:
    return run_memory(run.config, run.architecture, run.gpu.memory_bytes, run.world_size)


def largest_length(run: PlannedRun, section: str, field: str) -> int | None:
    """The largest value of a field in tokens with which an update fits and the engine's cache holds one sequence, in
    steps of 1,024 up to 1,024 of them; None if none does."""

    def is_too_long(steps: int) -> bool:
        memory = _memory(run.with_fields(section, **{field: steps * 1024}))
        return memory.peak_update > memory.capacity or not memory.holds_one_sequence

    return 1024 * bisect_left(range(1, 1025), True, key=is_too_long) or None


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
