"""Start a run: its engines, models, restored state, and the files that rank 0 writes."""

import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch.distributed as dist

from megatron_dsrl.checkpoint.state import current_layout
from megatron_dsrl.checkpoint.store import Checkpoint, CheckpointStore
from megatron_dsrl.config.run import RunConfig
from megatron_dsrl.data.prompt import Prompt
from megatron_dsrl.data.sampler import PromptSampler, SamplerState
from megatron_dsrl.data.tokenizer import stop_token_ids
from megatron_dsrl.evaluation.evaluator import Evaluator
from megatron_dsrl.observability.console import RunConsole
from megatron_dsrl.observability.timeline import NoTimeline, Timeline
from megatron_dsrl.observability.tracker import Tracker
from megatron_dsrl.observability.trackers.launch import Trackers
from megatron_dsrl.observability.waiting import waiting
from megatron_dsrl.provenance.start import record_run_start
from megatron_dsrl.rollout.carry_over import CarryOver
from megatron_dsrl.rollout.engine_rollout import EngineRollout
from megatron_dsrl.rollout.engines.awaiting_engines import awaiting_engines
from megatron_dsrl.rollout.recording import RolloutRecorder
from megatron_dsrl.rollout.replay import ReplayRollout
from megatron_dsrl.rollout.rollout import Rollout
from megatron_dsrl.run.controller import Controller
from megatron_dsrl.run.device_sharing import SharedDevice
from megatron_dsrl.run.folder import prepare_run_folder
from megatron_dsrl.run.inputs import RunInputs
from megatron_dsrl.run.models import RunModels, build_models
from megatron_dsrl.run.preemption import StopSignal
from megatron_dsrl.run.threads import use_cpu_threads

ROLLOUT_FOLDER = "rollout"
"""Folder in checkpoints for what the rollout side carries over to the next step."""


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
    for line in use_cpu_threads(config, inputs.model_folder):
        announce(console, line)
    with timeline.span("build_models"), waiting("building the model"):
        models = build_models(config, inputs.model_folder)
    computed_by = ", ".join(f"{part} {name}" for part, name in models.actor.implementations.items())
    announce(console, f"trainer: {computed_by}")
    sampler = PromptSampler(len(inputs.prompts), config.seed)
    if checkpoint:
        restore(checkpoint, config, sampler, models, rollout)
        announce(console, f"continuing after step {step} from {checkpoint.folder}")
    controller = start_controller(config, inputs, rollout, step, console, resources) if dist.get_rank() == 0 else None
    if controller:
        trackers.start()
    return TrainingRun(
        config=config,
        inputs=inputs,
        first_step=step + 1,
        models=models,
        rollout=rollout,
        device=SharedDevice(
            config.actor.offload,
            config.engine.weight_bucket_megabytes * 2**20,
            models.actor,
            models.critic,
            rollout,
            timeline.span,
        ),
        sampler=sampler,
        checkpoints=checkpoints,
        stop=resources.enter_context(StopSignal()),
        controller=controller,
        timeline=timeline,
        console=console,
    )


def restore(
    checkpoint: Checkpoint, config: RunConfig, sampler: PromptSampler, models: RunModels, rollout: Rollout
) -> None:
    """Restore prompt sampler, models and carried-over samples from a checkpoint. All ranks."""
    sampler.load_state_dict(cast(SamplerState, checkpoint.state.sampler))
    models.load(checkpoint, same_layout=checkpoint.state.layout == current_layout(config.parallel))
    if config.rollout.carries_over and dist.get_rank() == 0:
        rollout.take_over(CarryOver.read_from(checkpoint.folder / ROLLOUT_FOLDER))


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


def announce(console: RunConsole, text: str) -> None:
    """Print a line on rank 0."""
    if dist.get_rank() == 0:
        console.message(text)
