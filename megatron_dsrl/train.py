"""The training loop.

Every rank runs it. Rank 0 is also the controller: it samples, judges and records. What the other ranks need of that,
one `Experience` per step, is broadcast; everything else is collective over the ranks.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from megatron_dsrl.actor.actor import Actor
from megatron_dsrl.actor.build import build_actor
from megatron_dsrl.algorithms.experience import Experience, build_experience
from megatron_dsrl.algorithms.losses import make_token_loss
from megatron_dsrl.algorithms.schedule import Schedule
from megatron_dsrl.config.load import dump_config
from megatron_dsrl.config.phase import PhaseConfig, PreTrainSpaceConfig
from megatron_dsrl.config.run import EvaluationSetConfig, RunConfig
from megatron_dsrl.controller import Controller, responses_of
from megatron_dsrl.data.prompt import Prompt
from megatron_dsrl.data.prompts import load_prompts
from megatron_dsrl.data.tokenizer import bos_token_ids, load_tokenizer, stop_token_ids
from megatron_dsrl.errors import UserError
from megatron_dsrl.evaluation.evaluator import Evaluator
from megatron_dsrl.model.architecture import read_architecture, resolve_model_folder
from megatron_dsrl.model.parallel import destroy_parallel, initialize_parallel
from megatron_dsrl.observability.console import RunConsole
from megatron_dsrl.observability.timer import SecondsPerPart
from megatron_dsrl.observability.tracker import METRICS_FILE, Tracker
from megatron_dsrl.rollout.rollout import Rollout, start_rollout
from megatron_dsrl.rollout.sample import Group


def train(config: RunConfig) -> None:
    """Run a whole training. All ranks call it.

    Raises:
        UserError: the model, the data or the run folder is not what the configuration needs; found before anything
            heavy starts.
    """
    inputs = load_inputs(config)
    with ExitStack() as resources:
        initialize_parallel(config.parallel, config.seed)
        resources.callback(destroy_parallel)
        if dist.get_rank() == 0:
            start_run_folder(inputs.run_folder, config)
        rollout = start_rollout(config, inputs.run_folder, stop_token_ids(inputs.tokenizer), inputs.decode)
        resources.callback(rollout.close)
        rollout.wait_until_ready()
        rollout.release_memory()
        actor = build_actor(config, inputs.model_folder)
        push_weights(config, actor, rollout, version=1)
        controller = start_controller(config, inputs, rollout, resources) if dist.get_rank() == 0 else None
        run_steps(config, inputs, actor, rollout, controller)


def run_steps(
    config: RunConfig, inputs: "RunInputs", actor: Actor, rollout: Rollout, controller: Controller | None
) -> None:
    """Sample, judge, update, push the weights; again. `controller` is there on rank 0 only."""
    schedule = Schedule(config.phases)
    if controller:
        controller.evaluate(step=0)
    for step in range(1, config.steps + 1):
        phase = schedule.at(step)
        timer = SecondsPerPart()
        with timer.part("generate"):
            groups = controller.sample(step) if controller else []
        with timer.part("train"):
            rollout.release_memory()
            experience = share_experience(groups, phase, inputs.tokenizer)
            update = actor.update(
                experience, make_token_loss(phase.loss), phase.coefficient, config.actor.optimizer_steps_per_rollout
            )
        with timer.part("push_weights"):
            push_weights(config, actor, rollout, version=step + 1)
        with timer.part("evaluate"):
            if controller and is_due(step, config.evaluation.every_steps, config.steps):
                controller.evaluate(step)
        with timer.part("checkpoint"):
            if is_due(step, config.checkpoint.export_hf_every_steps, config.steps):
                actor.export_hf(inputs.run_folder / "hf" / f"step_{step:06d}")
        if controller:
            controller.record(step, phase, groups, update, timer)


@dataclass(frozen=True)
class RunInputs:
    """What a run reads before it starts."""

    run_folder: Path
    model_folder: Path
    tokenizer: PreTrainedTokenizerBase
    prompts: list[Prompt]
    evaluation_sets: list[tuple[EvaluationSetConfig, list[Prompt]]]

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of a response, without special tokens."""
        return self.tokenizer.decode(token_ids, skip_special_tokens=True)


def load_inputs(config: RunConfig) -> RunInputs:
    """Read model description, tokenizer and prompts.

    Raises:
        UserError: one of them is missing or does not fit.
    """
    model_folder = resolve_model_folder(config.model.path)
    tokenizer = load_tokenizer(str(model_folder), read_architecture(model_folder).vocab_size)
    return RunInputs(
        run_folder=Path(config.output_dir) / config.name,
        model_folder=model_folder,
        tokenizer=tokenizer,
        prompts=load_prompts(config.data, tokenizer),
        evaluation_sets=[
            (evaluation_set, load_prompts(evaluation_set, tokenizer, section=f"evaluation.sets.{i}"))
            for i, evaluation_set in enumerate(config.evaluation.sets)
        ],
    )


def start_run_folder(run_folder: Path, config: RunConfig) -> None:
    """Make the run folder and keep the resolved configuration in it.

    Raises:
        UserError: the folder holds a run already, or cannot be written to.
    """
    if (run_folder / METRICS_FILE).exists():
        raise UserError(f"{run_folder} holds a run already; choose another `name` or `output_dir`, or remove it")
    try:
        run_folder.mkdir(parents=True, exist_ok=True)
        dump_config(config, run_folder / "config.yaml")
    except OSError as error:
        raise UserError(f"cannot write the run folder {run_folder} (output_dir, name): {error}") from error


def start_controller(config: RunConfig, inputs: RunInputs, rollout: Rollout, resources: ExitStack) -> Controller:
    """Rank 0's controller; its files are closed with `resources`."""
    return Controller(
        config=config,
        run_folder=inputs.run_folder,
        prompts=inputs.prompts,
        rollout=rollout,
        evaluator=Evaluator(inputs.evaluation_sets, rollout),
        tracker=resources.enter_context(Tracker(inputs.run_folder, config.observability.tensorboard)),
        console=RunConsole(config.steps),
    )


def share_experience(groups: list[Group], phase: PhaseConfig, tokenizer: PreTrainedTokenizerBase) -> Experience:
    """The step's experience, built from the groups of rank 0, on every rank."""
    shared: list[Experience | None] = [None]
    if dist.get_rank() == 0:
        in_pre_train_space = isinstance(phase.space, PreTrainSpaceConfig)
        bos_ids = bos_token_ids(tokenizer, phase.space.bos) if in_pre_train_space else ()
        shared = [build_experience(responses_of(groups), phase, bos_ids)]
    dist.broadcast_object_list(shared, src=0)
    assert shared[0] is not None
    return shared[0]


def push_weights(config: RunConfig, actor: Actor, rollout: Rollout, version: int) -> None:
    """Give the engines the actor's current weights, and their memory back: the cache last, when room is largest."""
    rollout.resume_weights()
    rollout.load_weights(actor.hf_weights(config.engine.weight_bucket_megabytes * 2**20), version)
    rollout.resume_kv_cache()


def is_due(step: int, every_steps: int | None, last_step: int) -> bool:
    """Whether what happens every so many steps, and after the last one, happens after this step."""
    return step == last_step or (every_steps is not None and step % every_steps == 0)
