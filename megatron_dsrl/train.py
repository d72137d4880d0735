"""The training loop.

Every rank runs it. Rank 0 is also the controller: it samples, judges and records, and broadcasts the responses of each
step. Everything else is collective over the ranks.

A run that is started again continues from its newest checkpoint, exactly as it would have without the interruption.
"""

from contextlib import ExitStack
from functools import partial

from megatron_dsrl.actor.statistics import UpdateMetrics
from megatron_dsrl.common.collective import gather, on_first
from megatron_dsrl.config.phase import PhaseConfig
from megatron_dsrl.config.run import RunConfig
from megatron_dsrl.observability.timer import SecondsPerPart
from megatron_dsrl.publishing.card import refresh_card
from megatron_dsrl.rollout.step_sampling import StepSamples
from megatron_dsrl.run.closing import closing_lines
from megatron_dsrl.run.preemption import Preempted
from megatron_dsrl.run.sampling import begin_ahead, evaluate_policy, finish_ahead, sample, share_experiences
from megatron_dsrl.run.saving import export_policy, save_and_stop, save_checkpoint, stop_if_requested
from megatron_dsrl.run.start import start_run
from megatron_dsrl.run.training_run import TrainingRun


def train(config: RunConfig) -> None:
    """Run a training, or continue it from its newest checkpoint. All ranks call it.

    Raises:
        UserError: the model, the data or the run folder does not fit the configuration, or another process is using
            the run folder; raised before anything expensive starts.
        Preempted: the process was asked to stop; the run's state is saved.
    """
    with ExitStack() as resources:
        run = start_run(config, resources)
        begin(run)
        for step in range(run.first_step, config.steps + 1):
            run.checkpoints.poll()
            stop_if_requested(run, step - 1)
            with run.profiler.step(step):
                train_step(run, step)
            evaluate_policy(run, step)
            refresh_model_card(run, step)
        finish(run)


def begin(run: TrainingRun) -> None:
    """Give the engines the policy, and make up for the export and evaluation that an interrupted run missed."""
    run.device.push_weights(version=run.first_step)
    export_policy(run, run.first_step - 1)
    run.device.give_to_engine()
    evaluate_policy(run, run.first_step - 1)
    refresh_model_card(run, run.first_step - 1)


def train_step(run: TrainingRun, step: int) -> None:
    """Sample and judge responses, update the policy on them, push its weights to the engines; then record and save."""
    phase = run.schedule.at(step)
    run.timeline.begin_step(step)
    timer = SecondsPerPart(span=partial(run.doing, step))
    sampler = run.sampler.state_dict()
    with timer.part("generate"):
        samples = sample(run, step)
    with timer.part("train"):
        experiences = share_experiences(run, step, samples, phase)
        if experiences is None:
            save_and_stop(run, step - 1, sampler)
        sampler = run.sampler.state_dict()
        begin_ahead(run, step)
        run.checkpoints.poll()
        run.device.give_to_trainer()
        run.models.begin_step(step)
    experiences = run.models.add_log_probs_and_values(phase, experiences, timer)
    critic_metrics = run.models.update_critic(phase, experiences, timer)
    update = run.models.update_policy(step, phase, experiences, timer)
    with timer.part("generate"):
        may_go_on = finish_ahead(run, step)
    if may_go_on:
        with timer.part("push_weights"):
            push_weights(run, step)
    record_step(run, step, phase, samples, update, critic_metrics, timer)
    if not may_go_on:
        save_and_stop(run, step, sampler)
    save(run, step)


def push_weights(run: TrainingRun, step: int) -> None:
    """Give the engines the updated policy and, unless it is saved first, the device."""
    trainer_stays = run.saves_after(step) or run.exports_after(step)
    run.device.push_weights(version=step + 1, trainer_stays=trainer_stays)
    if not trainer_stays:
        run.device.give_to_engine()


def save(run: TrainingRun, step: int) -> None:
    """Save and export the policy where that is due; the engines have the device afterwards."""
    if run.saves_after(step):
        save_checkpoint(run, step, run.sampler.state_dict())
    export_policy(run, step)
    if run.saves_after(step) or run.exports_after(step):
        run.device.give_to_engine()


def record_step(
    run: TrainingRun,
    step: int,
    phase: PhaseConfig,
    samples: StepSamples | None,
    update: UpdateMetrics | None,
    critic_metrics: dict[str, float],
    timer: SecondsPerPart,
) -> None:
    """Record and print a finished step on rank 0. An error, such as a full disk, is raised on all ranks."""

    def record() -> None:
        assert run.controller is not None and samples is not None
        run.controller.record(step, phase, samples, update, critic_metrics | run.device.metrics(), timer)

    on_first(record)


def refresh_model_card(run: TrainingRun, step: int) -> None:
    """Rank 0: the model card of the policy after this step, if it was exported, with its evaluation."""
    if run.controller:
        refresh_card(run.inputs.run_folder, step, print)


def finish(run: TrainingRun) -> None:
    """Wait for the last checkpoint and say where the results are.

    Raises:
        Preempted: the process was asked to stop during the last step.
    """
    run.checkpoints.finish()
    if run.controller is not None:
        run.console.message("\n".join(closing_lines(run.inputs.run_folder, run.config.steps)))
    # Also a barrier: every rank's engine serves rank 0 until the last evaluation is done.
    if any(gather(run.stop.requested)):
        raise Preempted
