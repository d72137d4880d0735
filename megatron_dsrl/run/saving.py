"""What a run leaves on disk: checkpoints and exported policies. All functions are collective."""

from typing import NoReturn

from megatron_dsrl.checkpoint.state import RunState, current_layout
from megatron_dsrl.common.collective import gather, on_first, rank
from megatron_dsrl.common.waiting import say_on_first_rank
from megatron_dsrl.rollout.unfinished import CarryOverWrite
from megatron_dsrl.run.preemption import Preempted
from megatron_dsrl.run.results import exported_policy
from megatron_dsrl.run.start import ROLLOUT_FOLDER, TrainingRun


def save(run: TrainingRun, step: int) -> None:
    """Save a checkpoint of the state after `step`."""
    # Nothing before a checkpoint is repeated, so the rollouts must be on disk first.
    on_first(lambda: run.recorder.flush() if run.recorder else None)
    state = RunState(
        step=step,
        phase=run.schedule.at(step).name,
        sampler=dict(run.sampler.state_dict()),
        layout=current_layout(run.config.parallel),
        model=run.inputs.model,
        config=run.config.model_dump(mode="json"),
    )
    others = run.models.other_parts()
    if run.config.rollout.carries_over:
        carried = run.rollout.carried if rank() == 0 else None
        others[ROLLOUT_FOLDER] = lambda folder, copy: CarryOverWrite(carried, folder)
    with run.timeline.span("save_checkpoint"):
        run.device.make_room_for_checkpoint()
        run.checkpoints.save(state, run.models.actor.model.start_save, others)


def export(run: TrainingRun, step: int) -> None:
    """Export the policy after this step, unless it was exported before."""
    target = exported_policy(run.inputs.run_folder, step)
    if not target.exists():
        with run.timeline.span("export"):
            run.models.actor.export_hf(target)


def stop_if_requested(run: TrainingRun, step: int) -> None:
    """`save_and_stop` if any rank was asked to stop; SLURM and torchrun may signal any of them."""
    if any(gather(run.stop.requested)):
        save_and_stop(run, step)


def save_and_stop(run: TrainingRun, step: int) -> NoReturn:
    """Save the state after the last finished step, unless it is saved (0: nothing to save), and raise Preempted."""
    run.checkpoints.finish()
    if step > 0 and not run.checkpoints.has(step):
        if not run.device.trainer_is_whole:
            run.device.give_to_trainer()
        save(run, step)
        run.checkpoints.finish()
    where = f"after step {step}, with its state saved" if step > 0 else "before the end of its first step"
    say_on_first_rank(f"stopped {where}; the same command continues the run")
    raise Preempted
