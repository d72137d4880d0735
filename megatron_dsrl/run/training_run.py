"""What the steps of a training run work with."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

from megatron_dsrl.algorithms.schedule import Schedule
from megatron_dsrl.checkpoint.store import CheckpointStore
from megatron_dsrl.config.run import RunConfig
from megatron_dsrl.data.mixture import Sampler
from megatron_dsrl.data.prompt import Prompt
from megatron_dsrl.observability.console import RunConsole
from megatron_dsrl.observability.profiler import StepProfiler
from megatron_dsrl.observability.timeline import NoTimeline, Timeline
from megatron_dsrl.rollout.rollout import Rollout
from megatron_dsrl.run.controller import Controller
from megatron_dsrl.run.device_sharing import SharedDevice
from megatron_dsrl.run.inputs import RunInputs
from megatron_dsrl.run.models import RunModels
from megatron_dsrl.run.preemption import StopSignal


@dataclass(frozen=True)
class TrainingRun:
    """Everything that the steps of a run need. One per rank."""

    config: RunConfig
    inputs: RunInputs
    schedule: Schedule
    first_step: int
    """1, or the step after the checkpoint."""
    models: RunModels
    rollout: Rollout
    device: SharedDevice
    """Shared by the models and the rollout's engines."""
    sampler: Sampler
    """Rank 0 draws from it; the other ranks' state is synchronised every step."""
    checkpoints: CheckpointStore
    stop: StopSignal
    controller: Controller | None
    """Rank 0 only."""
    timeline: Timeline | NoTimeline
    profiler: StepProfiler
    console: RunConsole

    @contextmanager
    def doing(self, step: int, part: str) -> Iterator[None]:
        """Record a part of a step in the timeline, and show it on rank 0's terminal (sampling has its own bar)."""
        shown = self.controller is not None and part != "generate"
        with self.timeline.span(part), self.console.doing(step, part.replace("_", " ")) if shown else nullcontext():
            yield

    def draw(self, count: int) -> list[Prompt]:
        """The next prompts to train on. Rank 0 only."""
        return [self.inputs.prompts[i] for i in self.sampler.next(count)]

    def saves_after(self, step: int) -> bool:
        """Whether a checkpoint is due after this step."""
        return is_due(step, self.config.checkpoint.save_every_steps, self.config.steps)

    def exports_after(self, step: int) -> bool:
        """Whether an export in Hugging Face's format is due after this step."""
        return step > 0 and is_due(step, self.config.checkpoint.export_hf_every_steps, self.config.steps)

    def evaluates_after(self, step: int) -> bool:
        """Whether an evaluation is due after this step; 0 is before training."""
        return step == 0 or is_due(step, self.config.evaluation.interval_at(step), self.config.steps)


def is_due(step: int, every_steps: int | None, last_step: int) -> bool:
    """Whether something that happens every `every_steps` steps, and after the last one, is due after this step."""
    return step == last_step or (every_steps is not None and step % every_steps == 0)
