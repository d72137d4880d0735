"""The training loop.

Every rank runs it. Rank 0 is also the controller: it samples, judges and records, and broadcasts the responses of each
step. Everything else is collective over the ranks.

A run that is started again continues from its newest checkpoint, exactly as it would have without the interruption.
"""

import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NoReturn, cast

import torch.distributed as dist

from megatron_dsrl.actor.statistics import UpdateMetrics
from megatron_dsrl.algorithms.experience import Experience, build_experience
from megatron_dsrl.algorithms.reward_shaping import shape_rewards
from megatron_dsrl.algorithms.schedule import Schedule
from megatron_dsrl.checkpoint.compatibility import check_same_model, check_same_optimizer
from megatron_dsrl.checkpoint.state import RunState, current_layout
from megatron_dsrl.checkpoint.store import Checkpoint, CheckpointStore
from megatron_dsrl.common.collective import broadcast, gather, on_first
from megatron_dsrl.common.folder_lock import locked
from megatron_dsrl.config.phase import PhaseConfig
from megatron_dsrl.config.run import RunConfig
from megatron_dsrl.data.prompt import Prompt
from megatron_dsrl.data.sampler import PromptSampler, SamplerState
from megatron_dsrl.data.tokenizer import context_token_ids, stop_token_ids
from megatron_dsrl.evaluation.evaluator import Evaluator
from megatron_dsrl.model.parallel import destroy_parallel, initialize_parallel
from megatron_dsrl.observability.console import RunConsole
from megatron_dsrl.observability.timeline import NoTimeline, Timeline
from megatron_dsrl.observability.timer import SecondsPerPart
from megatron_dsrl.observability.tracker import Tracker
from megatron_dsrl.observability.trackers.launch import Trackers
from megatron_dsrl.observability.waiting import waiting
from megatron_dsrl.platform import current_platform
from megatron_dsrl.provenance.start import record_run_start
from megatron_dsrl.publishing.card import refresh_card
from megatron_dsrl.rollout.carry_over import CarryOver, CarryOverWrite
from megatron_dsrl.rollout.engine_rollout import EngineRollout
from megatron_dsrl.rollout.engines.awaiting_engines import awaiting_engines
from megatron_dsrl.rollout.recording import RolloutRecorder
from megatron_dsrl.rollout.replay import ReplayRollout
from megatron_dsrl.rollout.responses import responses_of
from megatron_dsrl.rollout.rollout import Rollout
from megatron_dsrl.rollout.step_sampling import StepSamples
from megatron_dsrl.run.closing import closing_lines
from megatron_dsrl.run.controller import Controller
from megatron_dsrl.run.device_sharing import SharedDevice
from megatron_dsrl.run.folder import check_run_folder, prepare_run_folder
from megatron_dsrl.run.inputs import RunInputs, load_inputs
from megatron_dsrl.run.models import RunModels, build_models
from megatron_dsrl.run.preemption import Preempted, StopRequested, StopSignal
from megatron_dsrl.run.results import exported_policy

ROLLOUT_FOLDER = "rollout"
"""Folder in checkpoints for what the rollout side carries over to the next step."""


def train(config: RunConfig) -> None:
    """Run a training, or continue it from its newest checkpoint. All ranks call it.

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
            inputs.run_folder / "checkpoints",
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


@dataclass(frozen=True)
class TrainingRun:
    """Everything that the steps of a run need. One per rank."""

    config: RunConfig
    inputs: RunInputs
    first_step: int
    """1, or the step after the checkpoint."""
    models: RunModels
    rollout: Rollout
    device: SharedDevice
    """Shared by the models and the rollout's engines."""
    sampler: PromptSampler
    """Rank 0 draws from it; the other ranks' state is synchronised every step."""
    checkpoints: CheckpointStore
    stop: StopSignal
    controller: Controller | None
    """Rank 0 only."""
    timeline: Timeline | NoTimeline
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


def run_steps(run: TrainingRun) -> None:
    """The loop: sample, judge, update, push the weights."""
    schedule = Schedule(run.config.phases)
    run.device.push_weights(version=run.first_step)
    export_policy(run, run.first_step - 1)  # an interrupted run may have missed this export and the evaluation below
    run.device.give_to_engine()
    evaluate_policy(run, run.first_step - 1)
    write_card_of(run, run.first_step - 1)
    for step in range(run.first_step, run.config.steps + 1):
        run.checkpoints.poll()
        if any(gather(run.stop.requested)):  # SLURM and torchrun may signal any rank
            stop_as_asked(run, step - 1, run.sampler.state_dict())
        phase = schedule.at(step)
        run.timeline.begin_step(step)
        timer = SecondsPerPart(span=partial(run.doing, step))
        sampler_before = run.sampler.state_dict()
        with timer.part("generate"):
            samples = sample(run, step)
        with timer.part("train"):
            experiences = share_experiences(run, step, samples, phase)
            if experiences is None:
                stop_as_asked(run, step - 1, sampler_before)
            sampler_before = run.sampler.state_dict()
            begin_ahead(run, step)
            run.checkpoints.poll()
            run.device.give_to_trainer()
            run.models.begin_step(step)
        experiences = run.models.make_passes(phase, experiences, timer)
        critic_metrics = run.models.update_critic(phase, experiences, timer)
        update = run.models.update_policy(step, phase, experiences, timer)
        saves = is_due(step, run.config.checkpoint.save_every_steps, run.config.steps)
        trainer_stays = saves or is_due(step, run.config.checkpoint.export_hf_every_steps, run.config.steps)
        with timer.part("generate"):
            stopped = not finish_ahead(run, step)
        if stopped:
            record_step(run, step, phase, samples, update, critic_metrics, timer)
            stop_as_asked(run, step, sampler_before)
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
        write_card_of(run, step)
    run.checkpoints.finish()
    if run.controller is not None:
        run.console.message("\n".join(closing_lines(run.inputs.run_folder, run.config.steps)))
    # Also a barrier: every rank's engine serves rank 0 until the last evaluation is done.
    if any(gather(run.stop.requested)):
        raise Preempted


def start_run(
    config: RunConfig,
    inputs: RunInputs,
    checkpoints: CheckpointStore,
    checkpoint: Checkpoint | None,
    console: RunConsole,
    resources: ExitStack,
) -> TrainingRun:
    """Start the engines, build the models, restore the checkpoint. `resources` closes what has to be closed."""
    step = checkpoint.state.step if checkpoint else 0
    prepare_run_folder(config, inputs.run_folder, step)
    record_run_start("train", config, inputs, step, console.message)
    trackers = resources.enter_context(
        Trackers(config.observability.trackers, inputs.run_folder, console.message)
    )  # entered before the engines start, so that pending records are waited for after they have stopped
    timeline = open_timeline(config, inputs.run_folder, resources)
    rollout = start_rollout(with_model_folder(config, inputs.model_folder), inputs, timeline)
    resources.callback(rollout.close)
    with timeline.span("start_engines"), awaiting_engines(config, inputs.run_folder):
        rollout.wait_until_ready()
    rollout.release_memory()
    with timeline.span("build_models"), waiting("building the model"):
        models = build_models(config, inputs.model_folder)
    computed_by = ", ".join(f"{part} {name}" for part, name in models.actor.implementations.items())
    announce(console, f"trainer: {computed_by}")
    sampler = PromptSampler(len(inputs.prompts), config.seed)
    if checkpoint:
        sampler.load_state_dict(cast(SamplerState, checkpoint.state.sampler))
        models.load(checkpoint, same_layout=checkpoint.state.layout == current_layout(config.parallel))
        announce(console, f"continuing after step {step} from {checkpoint.folder}")
    controller = start_controller(config, inputs, rollout, step, console, resources) if dist.get_rank() == 0 else None
    if controller:
        trackers.start()
    if controller and checkpoint and config.rollout.carries_over:
        rollout.take_over(CarryOver.read_from(checkpoint.folder / ROLLOUT_FOLDER))
    return TrainingRun(
        config=config,
        inputs=inputs,
        first_step=step + 1,
        models=models,
        rollout=rollout,
        device=SharedDevice(config, models.actor, models.critic, rollout, timeline.span),
        sampler=sampler,
        checkpoints=checkpoints,
        stop=resources.enter_context(StopSignal()),
        controller=controller,
        timeline=timeline,
        console=console,
    )


def start_rollout(config: RunConfig, inputs: RunInputs, timeline: Timeline | NoTimeline) -> Rollout:
    """Start the engines without waiting for them, or open the recording to replay. All ranks."""
    stop_ids = tuple(stop_token_ids(inputs.tokenizer))
    if config.rollout.replay_from is not None:
        return ReplayRollout(config, inputs.prompts, stop_ids)
    return EngineRollout(config, inputs.run_folder, stop_ids, inputs.decode, timeline.engine_call)


def start_controller(
    config: RunConfig, inputs: RunInputs, rollout: Rollout, step: int, console: RunConsole, resources: ExitStack
) -> Controller:
    """Rank 0: open the files of the run, which continues after `step`. `resources` closes them."""
    tracker = resources.enter_context(Tracker(inputs.run_folder, config.observability.tensorboard))
    tracker.truncate_after(step)
    evaluator = Evaluator(inputs.evaluation_sets, rollout, config.reward.function)
    save_rollouts = config.observability.save_rollouts
    recorder = resources.enter_context(RolloutRecorder(inputs.run_folder)) if save_rollouts else None
    return Controller(config, recorder, rollout, evaluator, tracker, console)


def open_timeline(config: RunConfig, run_folder: Path, resources: ExitStack) -> Timeline | NoTimeline:
    """This rank's timeline, recorded until `resources` are closed if `observability.trace` is set."""
    if not config.observability.trace:
        return NoTimeline()
    return resources.enter_context(Timeline(run_folder, dist.get_rank(), socket.gethostname()))


def with_model_folder(config: RunConfig, folder: Path) -> RunConfig:
    """The configuration with `model.path` resolved, so that engines and trainer load the same folder."""
    return config.model_copy(update={"model": config.model.model_copy(update={"path": str(folder)})})


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


def write_card_of(run: TrainingRun, step: int) -> None:
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


def stop_as_asked(run: TrainingRun, step: int, sampler: SamplerState) -> NoReturn:
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


def announce(console: RunConsole, text: str) -> None:
    """Print a line on rank 0."""
    if dist.get_rank() == 0:
        console.message(text)
