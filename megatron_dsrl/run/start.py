"""Start a training run, or continue it from its newest checkpoint: read the inputs, start engines, build models."""

import socket
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import torch.distributed as dist

from megatron_dsrl.algorithms.schedule import Schedule
from megatron_dsrl.checkpoint.compatibility import check_same_model, check_same_optimizer
from megatron_dsrl.checkpoint.folders import Checkpoint
from megatron_dsrl.checkpoint.state import current_layout
from megatron_dsrl.checkpoint.store import CheckpointStore
from megatron_dsrl.common.folder_lock import locked
from megatron_dsrl.common.waiting import waiting
from megatron_dsrl.config.rollout import EngineConfig
from megatron_dsrl.config.run import Due, ObservabilityConfig, RunConfig
from megatron_dsrl.data.mixture import build_sampler
from megatron_dsrl.evaluation.evaluator import Evaluator
from megatron_dsrl.model.parallel import destroy_parallel, initialize_parallel
from megatron_dsrl.observability.console import RunConsole
from megatron_dsrl.observability.profiler import StepProfiler
from megatron_dsrl.observability.records import CHECKPOINTS_FOLDER
from megatron_dsrl.observability.timeline import Timeline
from megatron_dsrl.observability.tracker import Tracker
from megatron_dsrl.observability.trackers.launch import Trackers
from megatron_dsrl.platform import current_platform
from megatron_dsrl.platform.engine import can_release_engine_memory
from megatron_dsrl.rollout.engine_rollout import EngineRollout
from megatron_dsrl.rollout.engines.run_engines import awaiting_engines
from megatron_dsrl.rollout.engines.starting_server import StartingServer
from megatron_dsrl.rollout.recording import RolloutRecorder
from megatron_dsrl.rollout.rollout import Rollout
from megatron_dsrl.rollout.unfinished import CarryOver
from megatron_dsrl.rollout.without_engines import DatasetRollout, ReplayRollout
from megatron_dsrl.run.device_sharing import SharedDevice
from megatron_dsrl.run.folder import check_run_folder, prepare_run_folder
from megatron_dsrl.run.held_out_loss import HeldOutLosses
from megatron_dsrl.run.inputs import RunInputs, load_inputs
from megatron_dsrl.run.models import RunModels, build_models
from megatron_dsrl.run.preemption import StopSignal
from megatron_dsrl.run.provenance import record_run_start
from megatron_dsrl.run.reporting import Reporting
from megatron_dsrl.run.sampling import Sampling
from megatron_dsrl.run.saving import ROLLOUT_FOLDER, Saving
from megatron_dsrl.run.threads import use_cpu_threads
from megatron_dsrl.run.training_run import ExperienceBuilder, TrainingRun


def start_run(config: RunConfig, resources: ExitStack, starting: StartingServer | None) -> TrainingRun:
    """Everything up to the first step. All ranks call it; `resources` closes what has to be closed.

    Args:
        starting: process that becomes this rank's engine; None: a new one, if this rank owns an engine.

    Raises:
        UserError: the model, the data or the run folder does not fit the configuration, or another process is using
            the run folder; raised before anything expensive starts.
    """
    with waiting("reading tokenizer and prompts"):
        inputs = load_inputs(config)
    current_platform().record_collectives(inputs.run_folder / "collectives")
    if config.engine.urls:
        current_platform().prepare_weight_broadcast()
    initialize_parallel(config.parallel, config.seed)
    resources.callback(destroy_parallel)
    console = RunConsole(config.steps, config.observability.verbose)
    resources.enter_context(locked(inputs.run_folder, console.message))
    checkpoints, checkpoint = open_checkpoints(config, inputs, console, resources)
    step = checkpoint.state.step if checkpoint else 0
    sampler = build_sampler(config.data, inputs.prompts, config.seed)
    if checkpoint:
        sampler.load_state_dict(cast(Any, checkpoint.state.sampler))
    prepare_run_folder(config, inputs.run_folder, step)
    record_run_start("train", config, inputs, step, console.message)
    trackers = resources.enter_context(
        Trackers(config.observability.trackers, inputs.run_folder, console.message)
    )  # entered before the engines start, so that pending records are waited for after they have stopped
    timeline = open_timeline(config.observability.trace, inputs.run_folder, resources)
    profiler = step_profiler(config.observability, inputs.run_folder, console)
    rollout, models = start_rollout_and_models(config, inputs, timeline, console, resources, starting)
    if checkpoint:
        same_layout = checkpoint.state.layout == current_layout(config.parallel)
        models.load(checkpoint, same_layout)
        if config.rollout.carries_over and dist.get_rank() == 0:
            rollout.carried = CarryOver.read_from(checkpoint.folder / ROLLOUT_FOLDER)
        announce(console, f"continuing after step {step} from {checkpoint.folder}")
    tracker, recorder, evaluator = None, None, None
    if dist.get_rank() == 0:
        tracker = resources.enter_context(Tracker(inputs.run_folder, config.observability.tensorboard))
        tracker.truncate_after(step)
        recorder = open_recorder(config, inputs.run_folder, resources)
        evaluator = Evaluator(inputs.evaluation_sets, rollout, config.reward.function)
        trackers.start()
    reporting = Reporting(config, inputs.run_folder, rollout, tracker, timeline, profiler, console)
    stop = resources.enter_context(StopSignal())
    device = share_device(config, models, rollout, timeline)
    sampling = Sampling(rollout, device, inputs.prompts, sampler, stop, recorder, evaluator, reporting)
    return TrainingRun(
        steps=range(step + 1, config.steps + 1),
        schedule=Schedule(config.phases),
        due=Due(config),
        sampling=sampling,
        evaluate=(
            sampling.evaluate if config.rollout.source == "engine"
            else HeldOutLosses(inputs.evaluation_sets, models.actor, device, reporting).evaluate
        ),
        experiences=ExperienceBuilder(inputs.tokenizer, config.reward.overlong, config.rollout.max_response_tokens),
        models=models,
        device=device,
        saving=Saving(
            config, inputs.model, inputs.run_folder, models, device, rollout, checkpoints, stop, recorder, timeline
        ),
        reporting=reporting,
    )  # fmt: skip


def open_checkpoints(
    config: RunConfig, inputs: RunInputs, console: RunConsole, resources: ExitStack
) -> tuple[CheckpointStore, Checkpoint | None]:
    """The run's checkpoints, and the newest of them, which the run continues from.

    Raises:
        UserError: the run folder or the checkpoint does not fit the configuration.
    """
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


def start_rollout_and_models(
    config: RunConfig,
    inputs: RunInputs,
    timeline: Timeline,
    console: RunConsole,
    resources: ExitStack,
    starting: StartingServer | None,
) -> tuple[Rollout, RunModels]:
    """Start the engines, build the models meanwhile if they do not share devices, and wait for the engines."""
    resolved = config.with_fields("model", path=str(inputs.model_folder))  # that engines and trainer load one folder
    rollout = start_rollout(resolved, inputs, timeline, resources, starting)
    if engines_share_devices(config.engine):
        wait_for_engines(config, inputs, rollout, timeline)
        return rollout, start_models(config, inputs, timeline, console)
    models = start_models(config, inputs, timeline, console)
    wait_for_engines(config, inputs, rollout, timeline)
    return rollout, models


def start_rollout(
    config: RunConfig,
    inputs: RunInputs,
    timeline: Timeline,
    resources: ExitStack,
    starting: StartingServer | None,
) -> Rollout:
    """Start the engines without waiting for them, or open what takes their place."""
    if config.rollout.source == "dataset":
        rollout: Rollout = DatasetRollout(config.rollout, len(inputs.prompts), inputs.stop_token_ids)
    elif config.rollout.replay_from is not None:
        rollout = ReplayRollout(config.rollout, inputs.prompts, inputs.stop_token_ids)
    else:
        rollout = EngineRollout(
            config,
            inputs.run_folder,
            inputs.stop_token_ids,
            inputs.decode,
            timeline.engine_call,
            starting,
            inputs.encode,
            config.steps,
        )
    resources.callback(rollout.close)
    return rollout


def engines_share_devices(engine: EngineConfig) -> bool:
    """Whether the models can be built only once the engines have started and released their memory: an engine on the
    trainer's GPU takes a share of what is free."""
    return can_release_engine_memory() and not engine.urls


def wait_for_engines(config: RunConfig, inputs: RunInputs, rollout: Rollout, timeline: Timeline) -> None:
    """Wait for the engines and lend their memory to the models."""
    with timeline.span("start_engines"), awaiting_engines(config, inputs.run_folder):
        rollout.wait_until_ready()
    rollout.release_memory()


def start_models(config: RunConfig, inputs: RunInputs, timeline: Timeline, console: RunConsole) -> RunModels:
    """Build the models, and say which implementations compute them on how many threads."""
    for line in use_cpu_threads(config, inputs.model_folder):
        announce(console, line)
    with timeline.span("build_models"), waiting("building the model"):
        models = build_models(config, inputs.model_folder)
    computed_by = ", ".join(f"{part} {name}" for part, name in models.actor.model.implementations.items())
    announce(console, f"trainer: {computed_by}")
    return models


def share_device(config: RunConfig, models: RunModels, rollout: Rollout, timeline: Timeline) -> SharedDevice:
    """The device that the models and the rollout's engines share."""
    bucket_bytes = config.engine.weight_bucket_megabytes * 2**20
    return SharedDevice(config.actor.offload, bucket_bytes, models.actor, models.critic, rollout, timeline.span)


def open_recorder(config: RunConfig, run_folder: Path, resources: ExitStack) -> RolloutRecorder | None:
    """Rank 0: what saves the rollouts until `resources` are closed, if anything does."""
    if not (config.observability.save_rollouts and config.rollout.source == "engine"):
        return None
    return resources.enter_context(RolloutRecorder(run_folder))


def open_timeline(is_recorded: bool, run_folder: Path, resources: ExitStack) -> Timeline:
    """This rank's timeline, recorded until `resources` are closed if at all."""
    timeline = Timeline(run_folder, dist.get_rank(), socket.gethostname(), current_platform().annotation)
    return resources.enter_context(timeline) if is_recorded else timeline


def step_profiler(chosen: ObservabilityConfig, run_folder: Path, console: RunConsole) -> StepProfiler:
    """This rank's profiler of `observability.profile_steps`.

    Raises:
        UserError: as `StepProfiler`.
    """
    return StepProfiler(
        chosen.profile_steps, run_folder, dist.get_rank(), chosen.profile_with == "nsight", console.message
    )


def announce(console: RunConsole, text: str) -> None:
    """Print a line on rank 0."""
    if dist.get_rank() == 0:
        console.message(text)
