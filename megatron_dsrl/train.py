"""The training loop.

Every rank runs it. Rank 0 is also the controller: it samples, judges and records, and broadcasts the responses of each
step. Everything else is collective over the ranks. `run/start.py` builds what the loop uses.

A run that is started again continues from its newest checkpoint, exactly as it would have without the interruption.
"""

from contextlib import ExitStack
from functools import partial
from typing import NoReturn

from megatron_dsrl.actor.statistics import UpdateMetrics
from megatron_dsrl.algorithms.experience import Experience, build_experience
from megatron_dsrl.algorithms.reward_shaping import shape_rewards
from megatron_dsrl.algorithms.schedule import Schedule
from megatron_dsrl.checkpoint.compatibility import check_same_model, check_same_optimizer
from megatron_dsrl.checkpoint.state import RunState, current_layout
from megatron_dsrl.checkpoint.store import CheckpointStore
from megatron_dsrl.common.collective import broadcast, gather, on_first
from megatron_dsrl.common.folder_lock import locked
from megatron_dsrl.config.phase import PhaseConfig
from megatron_dsrl.config.run import RunConfig
from megatron_dsrl.data.sampler import SamplerState
from megatron_dsrl.data.tokenizer import context_token_ids
from megatron_dsrl.model.parallel import destroy_parallel, initialize_parallel
from megatron_dsrl.observability.console import RunConsole
from megatron_dsrl.observability.timer import SecondsPerPart
from megatron_dsrl.observability.waiting import waiting
from megatron_dsrl.platform import current_platform
from megatron_dsrl.publishing.card import refresh_card
from megatron_dsrl.rollout.carry_over import CarryOverWrite
from megatron_dsrl.rollout.responses import responses_of
from megatron_dsrl.rollout.step_sampling import StepSamples
from megatron_dsrl.run.closing import closing_lines
from megatron_dsrl.run.folder import check_run_folder
from megatron_dsrl.run.inputs import load_inputs
from megatron_dsrl.run.preemption import Preempted, StopRequested
from megatron_dsrl.run.results import CHECKPOINTS_FOLDER, exported_policy
from megatron_dsrl.run.start import ROLLOUT_FOLDER, TrainingRun, start_run


def train(config: RunConfig) -> None:
    """Train a policy, or continue from the newest checkpoint. All ranks call it.

    Raises:
        UserError: the model, the data or the run folder does not fit the configuration, or another process is using
            the run folder; raised before anything expensive starts.
        Preempted: the process was asked to stop; the run's state is saved.
    """
    with ExitStack() as resources:
        with waiting("reading tokenizer and prompts"):
            inputs = load_inputs(config)
        current_platform().record_collectives(inputs.run_folder / "collectives")
        if config.engine.urls:
            current_platform().prepare_weight_broadcast()
        initialize_parallel(config.parallel, config.seed)
        resources.callback(destroy_parallel)
        console = RunConsole(config.steps, config.observability.verbose)
        resources.enter_context(locked(inputs.run_folder, console.message))
        checkpoints = CheckpointStore(
            inputs.run_folder / CHECKPOINTS_FOLDER,
            config.checkpoint.keep_last,
            config.checkpoint.keep_every_steps,
            report=console.message,
            asynchronous=config.checkpoint.asynchronous,
        )
        resources.callback(checkpoints.close)
        check_run_folder(config, inputs)
        checkpoint = checkpoints.newest()
        if checkpoint:
            check_same_model(checkpoint.state.model, inputs.model, str(checkpoint.folder))
            check_same_optimizer(checkpoint.state.layout, config.parallel, str(checkpoint.folder))
        run_steps(start_run(config, inputs, checkpoints, checkpoint, console, resources))


def run_steps(run: TrainingRun) -> None:
    """The loop: sample, judge, update, push the weights."""
    schedule = Schedule(run.config.phases)
    run.device.push_weights(version=run.first_step)
    export_policy(run, run.first_step - 1)  # an interrupted run may have missed this export and the evaluation below
    run.device.give_to_engine()
    evaluate_policy(run, run.first_step - 1)
    write_card(run, run.first_step - 1)
    for step in range(run.first_step, run.config.steps + 1):
        run.checkpoints.poll()
        if any(gather(run.stop.requested)):  # SLURM and torchrun may signal any rank
            save_and_stop(run, step - 1, run.sampler.state_dict())
        phase = schedule.at(step)
        run.timeline.begin_step(step)
        timer = SecondsPerPart(span=partial(run.doing, step))
        sampler_before = run.sampler.state_dict()
        with timer.part("generate"):
            samples = sample(run, step)
        with timer.part("train"):
            experiences = share_experiences(run, step, samples, phase)
            if experiences is None:
                save_and_stop(run, step - 1, sampler_before)
            sampler_before = run.sampler.state_dict()
            begin_ahead(run, step)
            run.checkpoints.poll()
            run.device.give_to_trainer()
            run.models.begin_step(step)
        experiences = run.models.add_log_probs_and_values(phase, experiences, timer)
        critic_metrics = run.models.update_critic(phase, experiences, timer)
        update = run.models.update_policy(step, phase, experiences, timer)
        saves = is_due(step, run.config.checkpoint.save_every_steps, run.config.steps)
        trainer_stays = saves or is_due(step, run.config.checkpoint.export_hf_every_steps, run.config.steps)
        with timer.part("generate"):
            stopped = not finish_ahead(run, step)
        if stopped:
            record_step(run, step, phase, samples, update, critic_metrics, timer)
            save_and_stop(run, step, sampler_before)
        with timer.part("push_weights"):
            run.device.push_weights(version=step + 1, trainer_stays=trainer_stays)
            if not trainer_stays:
                run.device.give_to_engine()
        record_step(run, step, phase, samples, update, critic_metrics, timer)
        if saves:
            save_checkpoint(run, step, run.sampler.state_dict())
        export_policy(run, step)
        if trainer_stays:
            run.device.give_to_engine()
        evaluate_policy(run, step)
        write_card(run, step)
    run.checkpoints.finish()
    if run.controller is not None:
        run.console.message("\n".join(closing_lines(run.inputs.run_folder, run.config.steps)))
    # Also a barrier: every rank's engine serves rank 0 until the last evaluation is done.
    if any(gather(run.stop.requested)):
        raise Preempted


def sample(run: TrainingRun, step: int) -> StepSamples | None:
    """Rank 0: the judged samples of the step, or None if the run was asked to stop. Other ranks: None."""

    def work() -> StepSamples | None:
        assert run.controller is not None
        try:
            with run.stop.interruptible():
                samples = run.rollout.sample_step(step, run.draw, run.controller.show_progress)
        except StopRequested:
            return None
        run.controller.keep(step, samples)
        return samples

    return run.rollout.while_sampling(work, lambda: recover_engines(run, version=step))


def recover_engines(run: TrainingRun, version: int) -> None:
    """Restart lost engines during a batch, with the weights that they had. All ranks."""
    # if a rank stopped in here, the others would wait for it
    with run.stop.deferred(), run.timeline.span("recover_engines"):
        run.device.push_weights(version)
        run.device.give_to_engine()


def begin_ahead(run: TrainingRun, step: int) -> None:
    """With `rollout.sample_ahead`, start sampling the next step on rank 0."""
    if run.config.rollout.sample_ahead and run.controller and step < run.config.steps:
        run.rollout.begin_ahead(step + 1, run.draw, run.controller.show_progress)


def finish_ahead(run: TrainingRun, step: int) -> bool:
    """Wait for the sampling that `begin_ahead` began; False if the run was asked to stop."""
    if not run.config.rollout.sample_ahead or step == run.config.steps:
        return True

    def work() -> bool:
        try:
            with run.stop.interruptible():
                run.rollout.finish_ahead()
        except StopRequested:
            return False
        return True

    return bool(broadcast(run.rollout.while_sampling(work, lambda: recover_engines(run, version=step))))


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


def share_experiences(
    run: TrainingRun, step: int, samples: StepSamples | None, phase: PhaseConfig
) -> list[Experience] | None:
    """Broadcast rank 0's groups as one experience per objective; None if the run was asked to stop."""
    shared = broadcast(
        None if samples is None else (responses_of(samples.groups, step), run.sampler.state_dict())
    )
    if shared is None:
        return None
    responses, sampler_state = shared
    run.sampler.load_state_dict(sampler_state)  # only rank 0 knows how many prompts the step drew
    responses = shape_rewards(responses, run.config.reward.overlong, run.config.rollout.max_response_tokens)
    return [
        build_experience(
            responses, objective.space, context_token_ids(run.inputs.tokenizer, objective.space.context_text)
        )
        for objective in phase.objectives.values()
    ]


def export_policy(run: TrainingRun, step: int) -> None:
    """Export the policy after this step if due and not done yet."""
    if step > 0 and is_due(step, run.config.checkpoint.export_hf_every_steps, run.config.steps):
        target = exported_policy(run.inputs.run_folder, step)
        if not target.exists():
            with run.timeline.span("export"):
                run.models.actor.export_hf(target)


def write_card(run: TrainingRun, step: int) -> None:
    """Rank 0: the model card of the policy after this step, if it was exported, with its evaluation."""
    if run.controller:
        refresh_card(run.inputs.run_folder, step, print)


def evaluate_policy(run: TrainingRun, step: int) -> None:
    """Run the evaluations that are due after this step (0: before training) and not done yet.

    A request to stop ends the evaluation; the run then stops before its next step, and evaluates when it is continued.
    """
    if step == 0 or is_due(step, run.config.evaluation.interval_at(step), run.config.steps):
        with run.timeline.span("evaluate"):
            run.rollout.while_sampling(lambda: evaluate(run, step), lambda: recover_engines(run, version=step + 1))


def evaluate(run: TrainingRun, step: int) -> None:
    """Rank 0's part of `evaluate_policy`."""
    assert run.controller is not None
    try:
        with run.stop.interruptible():
            run.controller.evaluate(step)
    except StopRequested:
        pass


def save_and_stop(run: TrainingRun, step: int, sampler: SamplerState) -> NoReturn:
    """Save the state after the last finished step and stop. Before the first step there is nothing to save."""
    if step > 0:
        if not run.device.trainer_is_whole:
            run.device.give_to_trainer()
        save_checkpoint(run, step, sampler)
        run.checkpoints.finish()
    raise Preempted


def save_checkpoint(run: TrainingRun, step: int, sampler: SamplerState) -> None:
    """Save a checkpoint of the state after `step`, with the given state of the sampler."""

    def flush_rollouts() -> None:
        assert run.controller is not None
        run.controller.flush_rollouts()

    on_first(flush_rollouts)  # nothing before a checkpoint is repeated, so the rollouts must be on disk first
    state = RunState(
        step=step,
        phase=Schedule(run.config.phases).at(step).name,
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


def is_due(step: int, every_steps: int | None, last_step: int) -> bool:
    """Whether something that happens every `every_steps` steps, and after the last one, is due after this step."""
    return step == last_step or (every_steps is not None and step % every_steps == 0)
