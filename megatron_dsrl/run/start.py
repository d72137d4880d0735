"""Start a training run, or continue it from its newest checkpoint: read the inputs, start engines, build models."""

import socket
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from megatron_dsrl.algorithms.schedule import Schedule
from megatron_dsrl.checkpoint.compatibility import check_same_model, check_same_optimizer
from megatron_dsrl.checkpoint.state import Checkpoint, current_layout
from megatron_dsrl.checkpoint.store import CheckpointStore
from megatron_dsrl.common.collective import on_first, rank
from megatron_dsrl.common.cpu_threads import cpu_threads, has_bfloat16
from megatron_dsrl.common.folder_lock import locked
from megatron_dsrl.common.waiting import waiting
from megatron_dsrl.config.run import Due, RunConfig
from megatron_dsrl.data.mixture import Sampler, build_sampler
from megatron_dsrl.model.architecture import read_architecture
from megatron_dsrl.model.parallel import destroy_parallel, initialize_parallel
from megatron_dsrl.observability.console import RunConsole
from megatron_dsrl.observability.profiler import StepProfiler
from megatron_dsrl.observability.records import CHECKPOINTS_FOLDER
from megatron_dsrl.observability.timeline import Timeline
from megatron_dsrl.observability.tracker import Tracker
from megatron_dsrl.observability.trackers.launch import Trackers
from megatron_dsrl.planning.parameters import parameters_of_model
from megatron_dsrl.platform import current_platform
from megatron_dsrl.platform.engine import can_release_engine_memory
from megatron_dsrl.rewards.registry import check_reward
from megatron_dsrl.rollout.engine_rollout import EngineRollout
from megatron_dsrl.rollout.engines.run_engines import awaiting_engines
from megatron_dsrl.rollout.engines.server_process import ServerProcess
from megatron_dsrl.rollout.recording import RolloutRecorder
from megatron_dsrl.rollout.rollout import Rollout
from megatron_dsrl.rollout.unfinished import CarryOver
from megatron_dsrl.rollout.without_engines import DatasetRollout, ReplayRollout
from megatron_dsrl.run.device_sharing import SharedDevice
from megatron_dsrl.run.folder import check_run_folder, prepare_run_folder, record_run_start
from megatron_dsrl.run.inputs import RunInputs, load_inputs
from megatron_dsrl.run.models import RunModels, build_models
from megatron_dsrl.run.preemption import StopSignal

ROLLOUT_FOLDER = "rollout"
"""Folder in checkpoints for what the rollout side carries over to the next step."""


@dataclass(frozen=True)
class TrainingRun:
    """Everything that one rank's training uses."""

    config: RunConfig
    inputs: RunInputs
    steps: range
    """The remaining ones: from 1, or from the step after the checkpoint."""
    schedule: Schedule
    due: Due
    sampler: Sampler
    """Rank 0 draws from it; the other ranks' state is synchronised every step."""
    rollout: Rollout
    models: RunModels
    device: SharedDevice
    """Shared by the models and the rollout's engines."""
    checkpoints: CheckpointStore
    stop: StopSignal
    console: RunConsole
    timeline: Timeline
    profiler: StepProfiler
    tracker: Tracker | None
    """Rank 0 only."""
    recorder: RolloutRecorder | None
    """Saves the rollouts, if anything does; rank 0 only."""


def start_run(config: RunConfig, resources: ExitStack, starting: ServerProcess | None) -> TrainingRun:
    """Everything up to the first step. All ranks call it; `resources` closes what has to be closed.

    Args and errors are those of `train`.
    """
    with waiting("reading tokenizer and prompts"):
        inputs = load_inputs(config)
    start_process_groups(config, inputs.run_folder, resources)
    on_first(lambda: check_verifiers(config))
    console = RunConsole(config.steps, config.observability.verbose)
    resources.enter_context(locked(inputs.run_folder, console.message))
    checkpoints, checkpoint = open_checkpoints(config, inputs, console, resources)
    step = checkpoint.state.step if checkpoint else 0
    sampler = build_sampler(config.data, inputs.prompts, config.seed)
    if checkpoint:
        sampler.load_state_dict(cast(Any, checkpoint.state.sampler))
    prepare_run_folder(config, inputs.run_folder, step)
    record_run_start("train", config, inputs, step, console.message)
    # entered before the engines start, so that pending records are waited for after they have stopped
    trackers = resources.enter_context(Trackers(config.observability.trackers, inputs.run_folder, console.message))
    timeline, profiler = open_timeline(config, inputs.run_folder, console, resources)
    rollout, models = start_rollout_and_models(config, inputs, timeline, console, resources, starting)
    if checkpoint:
        restore(config, checkpoint, models, rollout)
        announce(console, f"continuing after step {step} from {checkpoint.folder}")
    tracker, recorder = None, None
    if rank() == 0:
        tracker, recorder = open_records(config, inputs.run_folder, step, resources)
        trackers.start()
    bucket_bytes = config.engine.weight_bucket_megabytes * 2**20
    return TrainingRun(
        config=config,
        inputs=inputs,
        steps=range(step + 1, config.steps + 1),
        schedule=Schedule(config.phases),
        due=Due(config),
        sampler=sampler,
        rollout=rollout,
        models=models,
        device=SharedDevice(config.actor.offload, bucket_bytes, models.actor, models.critic, rollout, timeline.span),
        checkpoints=checkpoints,
        stop=resources.enter_context(StopSignal()),
        console=console,
        timeline=timeline,
        profiler=profiler,
        tracker=tracker,
        recorder=recorder,
    )


def check_verifiers(config: RunConfig) -> None:
    """Check the verifiers of prompt sets that have their own; those of held-out sets run when an evaluation is due.
    Raises UserError like `check_reward`."""
    for section, reward in config.data.set_rewards.values():
        check_reward(reward, section)
    for position, one in enumerate(config.evaluation.sets):
        if one.reward is not None:
            check_reward(one.reward, f"evaluation.sets.{position}.reward")


def start_process_groups(config: RunConfig, run_folder: Path, resources: ExitStack) -> None:
    """Make this process a rank of the trainer's process groups."""
    current_platform().record_collectives(run_folder / "collectives")
    if config.engine.urls:
        current_platform().prepare_weight_broadcast()
    initialize_parallel(config.parallel, config.seed)
    resources.callback(destroy_parallel)


def open_checkpoints(
    config: RunConfig, inputs: RunInputs, console: RunConsole, resources: ExitStack
) -> tuple[CheckpointStore, Checkpoint | None]:
    """The run's checkpoints, and the newest of them, which the run continues from. Raises UserError if the run folder
    or the checkpoint does not fit the configuration."""
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
    return checkpoints, checkpoint


def open_timeline(
    config: RunConfig, run_folder: Path, console: RunConsole, resources: ExitStack
) -> tuple[Timeline, StepProfiler]:
    """This rank's timeline, recorded until `resources` are closed if at all, and its profiler."""
    chosen = config.observability
    timeline = Timeline(run_folder, rank(), socket.gethostname(), current_platform().annotation)
    if chosen.trace:
        resources.enter_context(timeline)
    nsight = chosen.profile_with == "nsight"
    return timeline, StepProfiler(chosen.profile_steps, run_folder, rank(), nsight, console.message)


def start_rollout_and_models(
    config: RunConfig,
    inputs: RunInputs,
    timeline: Timeline,
    console: RunConsole,
    resources: ExitStack,
    starting: ServerProcess | None,
) -> tuple[Rollout, RunModels]:
    """Start the engines, build the models meanwhile if they do not share devices, and wait for the engines."""
    resolved = config.with_fields("model", path=str(inputs.model_folder))  # that engines and trainer load one folder
    rollout = start_rollout(resolved, inputs, timeline, starting)
    resources.callback(rollout.close)

    def wait_for_engines() -> None:
        with timeline.span("start_engines"), awaiting_engines(config, inputs.run_folder):
            rollout.wait_until_ready()
        rollout.release_memory()

    # an engine on the trainer's GPU takes a share of the memory that is free when it starts
    if shared_devices := can_release_engine_memory() and not config.engine.urls:
        wait_for_engines()
    models = start_models(config, inputs, timeline, console)
    if not shared_devices:
        wait_for_engines()
    return rollout, models


def start_rollout(config: RunConfig, inputs: RunInputs, timeline: Timeline, starting: ServerProcess | None) -> Rollout:
    """Start the engines without waiting for them, or open what takes their place."""
    if config.rollout.source == "dataset":
        return DatasetRollout(config.rollout, len(inputs.prompts), inputs.stop_token_ids)
    if config.rollout.replay_from is not None:
        return ReplayRollout(config.rollout, inputs.prompts, inputs.stop_token_ids)
    return EngineRollout(
        config,
        inputs.run_folder,
        inputs.stop_token_ids,
        inputs.decode,
        timeline.engine_call,
        starting,
        inputs.encode,
        config.steps,
    )


def start_models(config: RunConfig, inputs: RunInputs, timeline: Timeline, console: RunConsole) -> RunModels:
    """Build the models, and say which implementations compute them on how many threads."""
    if current_platform().name == "cpu":
        threads = cpu_threads(
            parameters_of_model(read_architecture(inputs.model_folder)),
            config.actor.cpu_threads,
            config.engine.cpu_threads,
        )
        torch.set_num_threads(threads.trainer)
        announce(console, f"threads: {threads} (actor.cpu_threads, engine.cpu_threads)")
        if config.model.dtype == "bfloat16" and not has_bfloat16():
            announce(console, "warning: this CPU has no bfloat16 instructions; model.dtype=float32 is faster here")
    with timeline.span("build_models"), waiting("building the model"):
        models = build_models(config, inputs.model_folder)
    computed_by = ", ".join(f"{part} {name}" for part, name in models.actor.model.implementations.items())
    announce(console, f"trainer: {computed_by}")
    return models


def open_records(
    config: RunConfig, run_folder: Path, step: int, resources: ExitStack
) -> tuple[Tracker, RolloutRecorder | None]:
    """Rank 0: what records steps and evaluations after `step`, and the rollouts if they are saved."""
    tracker = resources.enter_context(Tracker(run_folder, config.observability.tensorboard))
    tracker.truncate_after(step)
    if not (config.observability.save_rollouts and config.rollout.source == "engine"):
        return tracker, None
    return tracker, resources.enter_context(RolloutRecorder(run_folder))


def restore(config: RunConfig, checkpoint: Checkpoint, models: RunModels, rollout: Rollout) -> None:
    """Restore models and rollout from the checkpoint."""
    models.load(checkpoint, same_layout=checkpoint.state.layout == current_layout(config.parallel))
    if config.rollout.carries_over and rank() == 0:
        rollout.carried = CarryOver.read_from(checkpoint.folder / ROLLOUT_FOLDER)


def announce(console: RunConsole, text: str) -> None:
    """Print a line on rank 0."""
    if rank() == 0:
        console.message(text)
