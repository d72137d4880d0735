"""What a run leaves on disk: checkpoints and exported policies."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from megatron_dsrl.algorithms.schedule import Schedule
from megatron_dsrl.checkpoint.state import RunState, current_layout
from megatron_dsrl.checkpoint.store import CheckpointStore
from megatron_dsrl.common.collective import gather, on_first, rank
from megatron_dsrl.common.waiting import say_on_first_rank
from megatron_dsrl.config.run import RunConfig
from megatron_dsrl.data.mixture import MixtureState
from megatron_dsrl.data.samplers import SamplerState
from megatron_dsrl.observability.timeline import Timeline
from megatron_dsrl.rollout.recording import RolloutRecorder
from megatron_dsrl.rollout.rollout import Rollout
from megatron_dsrl.rollout.unfinished import CarryOverWrite
from megatron_dsrl.run.device_sharing import SharedDevice
from megatron_dsrl.run.models import RunModels
from megatron_dsrl.run.preemption import Preempted, StopSignal
from megatron_dsrl.run.results import exported_policy

ROLLOUT_FOLDER = "rollout"
"""Folder in checkpoints for what the rollout side carries over to the next step."""


@dataclass(frozen=True)
class Saving:
    """Saves, exports, and stops a run whose state is saved. Methods are collective."""

    config: RunConfig
    """Is part of every checkpoint."""
    model: dict[str, Any]
    """The model's description in every checkpoint."""
    run_folder: Path
    models: RunModels
    device: SharedDevice
    rollout: Rollout
    checkpoints: CheckpointStore
    stop: StopSignal
    recorder: RolloutRecorder | None
    """Saves the rollouts, if anything does; rank 0 only."""
    timeline: Timeline

    def publish_if_written(self) -> None:
        """Publish a checkpoint that is written in the background, if all ranks have written it."""
        self.checkpoints.poll()

    def save(self, step: int, sampler: SamplerState | MixtureState) -> None:
        """Save a checkpoint of the state after `step`, with the given state of the sampler."""
        # Nothing before a checkpoint is repeated, so the rollouts must be on disk first.
        on_first(lambda: self.recorder.flush() if self.recorder else None)
        state = RunState(
            step=step,
            phase=Schedule(self.config.phases).at(step).name,
            sampler=dict(sampler),
            layout=current_layout(self.config.parallel),
            model=self.model,
            config=self.config.model_dump(mode="json"),
        )
        others = self.models.other_parts()
        if self.config.rollout.carries_over:
            carried = self.rollout.carried if rank() == 0 else None
            others[ROLLOUT_FOLDER] = lambda folder, copy: CarryOverWrite(carried, folder)
        with self.timeline.span("save_checkpoint"):
            self.device.make_room_for_checkpoint()
            self.checkpoints.save(state, self.models.actor.model.start_save, others)

    def export(self, step: int) -> None:
        """Export the policy after this step, unless it was exported before."""
        target = exported_policy(self.run_folder, step)
        if not target.exists():
            with self.timeline.span("export"):
                self.models.actor.export_hf(target)

    def stop_if_requested(self, step: int, sampler: SamplerState | MixtureState) -> None:
        """Save and stop if any rank was asked to; SLURM and torchrun may signal any of them."""
        if any(gather(self.stop.requested)):
            self.save_and_stop(step, sampler)

    def save_and_stop(self, step: int, sampler: SamplerState | MixtureState) -> NoReturn:
        """Save the state after the last finished step and stop. Before the first step there is nothing to save.

        Raises:
            Preempted: always.
        """
        if step > 0:
            if not self.device.trainer_is_whole:
                self.device.give_to_trainer()
            self.save(step, sampler)
            self.checkpoints.finish()
        self._stop(step)

    def finish(self) -> None:
        """Wait for the last checkpoint."""
        self.checkpoints.finish()

    def raise_if_stopped(self, last_step: int) -> None:
        """Also a barrier.

        Raises:
            Preempted: a rank was asked to stop during the last step.
        """
        if any(gather(self.stop.requested)):
            self._stop(last_step)

    def _stop(self, step: int) -> NoReturn:
        where = f"after step {step}, with its state saved" if step > 0 else "before the end of its first step"
        say_on_first_rank(f"stopped {where}; the same command continues the run")
        raise Preempted
