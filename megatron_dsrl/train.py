"""The training loop.

Every rank runs it. Rank 0 is also the controller: it samples, judges and records, and broadcasts the responses of each
step. Everything else is collective over the ranks.

A run that is started again continues from its newest checkpoint, exactly as it would have without the interruption.
"""

from collections.abc import Sequence
from contextlib import ExitStack

from megatron_dsrl.algorithms.experience import Experience, Response, build_experience
from megatron_dsrl.algorithms.reward_shaping import shape_rewards
from megatron_dsrl.common.collective import rank
from megatron_dsrl.config.phase import PhaseConfig
from megatron_dsrl.config.run import RunConfig
from megatron_dsrl.data.tokenizer import context_token_ids
from megatron_dsrl.publishing.card import refresh_card
from megatron_dsrl.rollout.engines.server_process import ServerProcess
from megatron_dsrl.run.held_out import evaluate_accuracy, evaluate_loss
from megatron_dsrl.run.reporting import record_step, start_step
from megatron_dsrl.run.results import closing_lines
from megatron_dsrl.run.sampling import sample
from megatron_dsrl.run.saving import export, save, stop_if_requested
from megatron_dsrl.run.start import TrainingRun, start_run


def train(config: RunConfig, starting: ServerProcess | None = None) -> None:
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
        prepare_first_step(run)
        for step in run.steps:
            run.checkpoints.poll()  # publishes one that all ranks have written in the background
            stop_if_requested(run, step - 1)
            with run.profiler.step(step):
                train_step(run, step)
            evaluate(run, step)
        finish(run)


def prepare_first_step(run: TrainingRun) -> None:
    """Give the engines the policy, and make up for the export and evaluation that an interrupted run missed."""
    finished = run.steps.start - 1
    run.device.push_weights(version=run.steps.start)
    if run.due.export(finished):
        export(run, finished)
    run.device.give_to_engine()
    evaluate(run, finished)


def train_step(run: TrainingRun, step: int) -> None:
    """Sample and judge responses, update the policy on them, push its weights to the engines; then record and save."""
    phase = run.schedule.at(step)
    timer = start_step(run, step)
    with timer.part("generate"):
        samples, responses = sample(run, step)
    with timer.part("train"):
        experiences = build_experiences(run, phase, responses)
        run.checkpoints.poll()
        run.device.give_to_trainer()
        run.models.start_step(step)
    experiences = run.models.add_log_probs_and_values(phase, experiences, timer)
    critic_metrics = run.models.update_critic(phase, experiences, timer)
    update = run.models.update_policy(step, phase, experiences, timer)
    with timer.part("push_weights"):
        # the policy is saved from the device, which the engines get afterwards
        trainer_stays = run.due.save(step) or run.due.export(step)
        run.device.push_weights(version=step + 1, trainer_stays=trainer_stays)
        if not trainer_stays:
            run.device.give_to_engine()
    record_step(run, step, samples, update, critic_metrics, timer)
    if run.due.save(step):
        save(run, step)
    if run.due.export(step):
        export(run, step)
    if trainer_stays:
        run.device.give_to_engine()


def build_experiences(run: TrainingRun, phase: PhaseConfig, responses: Sequence[Response]) -> list[Experience]:
    """One experience per objective of the phase: the shaped rewards, and the responses in the context of its space."""
    shaped = shape_rewards(responses, run.config.reward.overlong, run.config.rollout.max_response_tokens)
    return [
        build_experience(shaped, objective.space, context_token_ids(run.inputs.tokenizer, objective.space.context_text))
        for objective in phase.objectives.values()
    ]


def evaluate(run: TrainingRun, step: int) -> None:
    """Evaluate the policy after this step (0: before training) if that is due, and complete its model card."""
    if run.due.evaluate(step):
        if run.config.rollout.source == "engine":
            evaluate_accuracy(run, step)
        else:
            evaluate_loss(run, step)
    if rank() == 0:
        refresh_card(run.inputs.run_folder, step, print)


def finish(run: TrainingRun) -> None:
    """Wait for the last checkpoint and say where the results are. Raises Preempted if the process was asked to stop
    during the last step."""
    run.checkpoints.finish()
    # also a barrier: every rank's engine serves rank 0 until the last evaluation is done
    stop_if_requested(run, run.config.steps)
    if rank() == 0:
        run.console.message("\n".join(closing_lines(run.inputs.run_folder, run.config.steps)))
