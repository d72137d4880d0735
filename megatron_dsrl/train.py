"""The training loop.

Every rank runs it. Rank 0 is also the controller: it samples, judges and records, and broadcasts the responses of each
step. Everything else is collective over the ranks.

A run that is started again continues from its newest checkpoint, exactly as it would have without the interruption.
"""

from contextlib import ExitStack

from megatron_dsrl.common.collective import rank
from megatron_dsrl.config.run import RunConfig
from megatron_dsrl.publishing.card import refresh_card
from megatron_dsrl.rollout.engines.starting_server import StartingServer
from megatron_dsrl.run.start import start_run
from megatron_dsrl.run.training_run import TrainingRun


def train(config: RunConfig, starting: StartingServer | None = None) -> None:
    """Run a training, or continue it from its newest checkpoint. All ranks call it.

    Args:
        starting: process that becomes this rank's engine; None: a new one, if this rank owns an engine.

    Raises:
        UserError: the model, the data or the run folder does not fit the configuration, or another process is using
            the run folder; raised before anything expensive starts.
        Preempted: the process was asked to stop; the run's state is saved.
    """
    with ExitStack() as resources:
        run = start_run(config, resources, starting)
        start(run)
        for step in run.steps:
            run.saving.publish_if_written()
            run.saving.stop_if_requested(step - 1, run.sampling.sampler_state())
            with run.reporting.profiler.step(step):
                train_step(run, step)
            evaluate(run, step)
        finish(run, config.steps)


def start(run: TrainingRun) -> None:
    """Give the engines the policy, and make up for the export and evaluation that an interrupted run missed."""
    finished = run.steps.start - 1
    run.device.push_weights(version=run.steps.start)
    if run.due.export(finished):
        run.saving.export(finished)
    run.device.give_to_engine()
    evaluate(run, finished)


def train_step(run: TrainingRun, step: int) -> None:
    """Sample and judge responses, update the policy on them, push its weights to the engines; then record and save."""
    phase = run.schedule.at(step)
    timer = run.reporting.start_step(step)
    sampler = run.sampling.sampler_state()
    with timer.part("generate"):
        samples = run.sampling.sample(step)
    with timer.part("train"):
        responses = run.sampling.share(step, samples)
        if responses is None:
            run.saving.save_and_stop(step - 1, sampler)
        experiences = run.experiences.build(responses, phase)
        run.saving.publish_if_written()
        run.device.give_to_trainer()
        run.models.start_step(step)
    experiences = run.models.add_log_probs_and_values(phase, experiences, timer)
    critic_metrics = run.models.update_critic(phase, experiences, timer)
    update = run.models.update_policy(step, phase, experiences, timer)
    with timer.part("push_weights"):
        push_weights(run, step)
    run.reporting.record(step, phase, samples, update, critic_metrics | run.device.metrics(), timer)
    save(run, step)


def push_weights(run: TrainingRun, step: int) -> None:
    """Give the engines the updated policy and, unless it is saved first, the device."""
    trainer_stays = run.due.save(step) or run.due.export(step)
    run.device.push_weights(version=step + 1, trainer_stays=trainer_stays)
    if not trainer_stays:
        run.device.give_to_engine()


def save(run: TrainingRun, step: int) -> None:
    """Save and export the policy where that is due; the engines have the device afterwards."""
    if run.due.save(step):
        run.saving.save(step, run.sampling.sampler_state())
    if run.due.export(step):
        run.saving.export(step)
    if run.due.save(step) or run.due.export(step):
        run.device.give_to_engine()


def evaluate(run: TrainingRun, step: int) -> None:
    """Evaluate the policy after this step (0: before training) if that is due, and complete its model card."""
    if run.due.evaluate(step):
        run.evaluate(step)
    if rank() == 0:
        refresh_card(run.reporting.run_folder, step, print)


def finish(run: TrainingRun, last_step: int) -> None:
    """Wait for the last checkpoint and say where the results are.

    Raises:
        Preempted: the process was asked to stop during the last step.
    """
    run.saving.finish()
    # also a barrier: every rank's engine serves rank 0 until the last evaluation is done
    run.saving.raise_if_stopped(last_step)
    run.reporting.finish(last_step)
