"""What a run leaves on disk: checkpoints and exported policies."""

from typing import NoReturn

from megatron_dsrl.checkpoint.state import RunState, current_layout
from megatron_dsrl.common.collective import gather, on_first
from megatron_dsrl.data.mixture import MixtureState
from megatron_dsrl.data.sampler import SamplerState
from megatron_dsrl.rollout.carry_over import CarryOverWrite
from megatron_dsrl.run.preemption import Preempted
from megatron_dsrl.run.results import exported_policy
from megatron_dsrl.run.training_run import TrainingRun

ROLLOUT_FOLDER = "rollout"
"""Folder in checkpoints for what the rollout side carries over to the next step."""


def save_checkpoint(run: TrainingRun, step: int, sampler: SamplerState | MixtureState) -> None:
    """Save a checkpoint of the state after `step`, with the given state of the sampler."""

    def flush_rollouts() -> None:
        assert run.controller is not None
        run.controller.flush_rollouts()

    on_first(flush_rollouts)  # nothing before a checkpoint is repeated, so the rollouts must be on disk first
    state = RunState(
        step=step,
        phase=run.schedule.at(step).name,
        sampler=dict(sampler),
        layout=current_layout(run.config.parallel),
        model=run.inputs.model,
        config=run.config.model_dump(mode="json"),
    )
    others = run.models.other_parts()
    if run.config.rollout.carries_over:
        carried = run.rollout.carried if run.controller else None
        others[ROLLOUT_FOLDER] = lambda folder, copy: CarryOverWrite(carried, folder)
    with run.timeline.span("save_checkpoint"):
        run.checkpoints.save(state, run.models.actor.begin_save, others)


def export_policy(run: TrainingRun, step: int) -> None:
    """Export the policy after this step if due and not done yet."""
    target = exported_policy(run.inputs.run_folder, step)
    if run.exports_after(step) and not target.exists():
        with run.timeline.span("export"):
            run.models.actor.export_hf(target)


def stop_if_requested(run: TrainingRun, step: int) -> None:
    """Save and stop if any rank was asked to; SLURM and torchrun may signal any of them."""
    if any(gather(run.stop.requested)):
        save_and_stop(run, step, run.sampler.state_dict())


def save_and_stop(run: TrainingRun, step: int, sampler: SamplerState | MixtureState) -> NoReturn:
    """Save the state after the last finished step and stop. Before the first step there is nothing to save.

    Raises:
        Preempted: always.
    """
    if step > 0:
        if not run.device.trainer_is_whole:
            run.device.give_to_trainer()
        save_checkpoint(run, step, sampler)
        run.checkpoints.finish()
    raise Preempted
