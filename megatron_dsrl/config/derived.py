"""What a configuration amounts to on a given number of processes: figures for people, and checks before a run starts.

Pure functions of the configuration, the world size, the model's sizes and the number of training prompts. Token counts
are upper bounds: every prompt at `data.max_prompt_tokens`, every response at `rollout.max_response_tokens`.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_dsrl.config.data import PromptSetConfig
from megatron_dsrl.config.layout import (
    ModelShape,
    Problem,
    engine_problems,
    model_problems,
    process_problems,
    processes,
)
from megatron_dsrl.config.model import RouterConfig
from megatron_dsrl.config.phase import ObjectiveConfig
from megatron_dsrl.config.phase_steps import PhaseSteps, phases_by_steps
from megatron_dsrl.config.rollout import MAX_REPLAYED_EXPERTS
from megatron_dsrl.config.run import RunConfig
from megatron_dsrl.errors import UserError

LONGEST_BOS = 3
"""Tokens of the longest `bos` of the pre-train space: `<|im_start|>`, `assistant`, a line break."""


@dataclass(frozen=True)
class PhaseFigures:
    """One phase as it will run."""

    name: str
    space: str
    """Of each objective at the phase's first step."""
    first_step: int
    """Counted from 1."""
    last_step: int
    """Inclusive; below `first_step` for a phase that the run ends before."""
    max_tokens_per_step: int
    """Upper bound of the tokens that go through the trainer in one step, all samples kept."""
    full_length_micro_batches: int
    """Micro-batches of one model replica in one optimizer step when every sample is kept and has full length."""

    @property
    def steps(self) -> int:
        """Steps that the run spends in the phase."""
        return max(0, self.last_step - self.first_step + 1)


@dataclass(frozen=True)
class RunFigures:
    """The derived figures of a run."""

    world_size: int
    model_parallel_size: int
    data_parallel_size: int
    """Copies of the model that train side by side."""
    engines: int
    """SGLang servers."""
    prompts_per_step: int
    samples_per_step: int
    optimizer_steps_per_rollout: int
    samples_per_optimizer_step: int
    optimizer_steps: int
    """Over the whole run."""
    max_generated_tokens_per_step: int
    max_tokens_per_micro_batch: int
    longest_sequence: int
    """Prompt plus response, in tokens."""
    phases: tuple[PhaseFigures, ...]
    prompts: int | None
    """Training prompts; None when not known before the run."""
    epochs: float | None
    """Passes over the training prompts in the whole run."""


def derive(config: RunConfig, world_size: int, shape: ModelShape | None, prompts: int | None = None) -> RunFigures:
    """Check a run's layout and give its figures.

    Args:
        config: the run.
        world_size: number of processes (one per GPU).
        shape: the model's sizes; None leaves out the checks that need them.
        prompts: number of training prompts where known.

    Raises:
        UserError: lists every field that does not fit, and what to do.
    """
    phases = list(phases_by_steps(config))
    problems = [
        *process_problems(config.parallel, world_size),
        *engine_problems(config.engine.tensor_parallel_size, world_size, shape),
        *_phase_problems(config),
        *_objective_problems(config, phases),
        *_batch_problems(config, world_size, prompts),
        *_time_problems(config),
        *_routing_problems(config, shape),
        *_length_problems(config, shape),
        *(model_problems(config.parallel, shape) if shape else ()),
    ]
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        lines = [f"  {fields}: {what}" for fields, what in problems]
        raise UserError("\n".join([f"run `{config.name}` on {processes(world_size)}: {count}", *lines]))
    return _figures(config, phases, world_size, prompts)


def _figures(config: RunConfig, phases: list[PhaseSteps], world_size: int, prompts: int | None) -> RunFigures:
    rollout = config.rollout
    samples = rollout.prompts_per_step * rollout.samples_per_prompt
    updates = config.actor.optimizer_steps_per_rollout
    data_parallel_size = world_size // config.parallel.model_parallel_size
    return RunFigures(
        world_size=world_size,
        model_parallel_size=config.parallel.model_parallel_size,
        data_parallel_size=data_parallel_size,
        engines=len(config.engine.urls) or world_size // config.engine.tensor_parallel_size,
        prompts_per_step=rollout.prompts_per_step,
        samples_per_step=samples,
        optimizer_steps_per_rollout=updates,
        samples_per_optimizer_step=samples // config.actor.mini_batches_per_rollout,
        optimizer_steps=config.steps * updates,
        max_generated_tokens_per_step=samples * rollout.max_response_tokens,
        max_tokens_per_micro_batch=config.actor.max_tokens_per_micro_batch,
        longest_sequence=config.data.max_prompt_tokens + rollout.max_response_tokens,
        phases=tuple(_phase_figures(config, phase, data_parallel_size) for phase in phases),
        prompts=prompts,
        epochs=None if prompts is None else config.steps * rollout.prompts_per_step / prompts,
    )


def _phase_figures(config: RunConfig, phase: PhaseSteps, data_parallel_size: int) -> PhaseFigures:
    samples = config.rollout.prompts_per_step * config.rollout.samples_per_prompt
    replica_samples = _ceil_divide(samples // config.actor.mini_batches_per_rollout, data_parallel_size)
    spaces = [[objective.space.name for objective in form.objectives.values()] for form in phase.forms]
    lengths = [[_longest_sequence(config, space) for space in of_form] for of_form in spaces]
    return PhaseFigures(
        name=phase.name,
        space=" + ".join(spaces[0]),
        first_step=phase.first_step,
        last_step=phase.last_step,
        max_tokens_per_step=samples * max(map(sum, lengths)),
        full_length_micro_batches=max(
            sum(_micro_batches(config, replica_samples, length) for length in of_form) for of_form in lengths
        ),
    )


def _longest_sequence(config: RunConfig, space: str) -> int:
    context = config.data.max_prompt_tokens if space == "post_train" else LONGEST_BOS
    return context + config.rollout.max_response_tokens


def _micro_batches(config: RunConfig, samples: int, length: int) -> int:
    """Of one replica's samples of this length; context parallelism pads each, the interleaved schedule their number."""
    parallel = config.parallel
    multiple = 2 * parallel.context_parallel_size if parallel.context_parallel_size > 1 else 1
    padded = _ceil_divide(length, multiple) * multiple
    count = _ceil_divide(samples, max(1, config.actor.max_tokens_per_micro_batch // padded))
    multiple = parallel.pipeline_parallel_size if parallel.virtual_pipeline_stages > 1 else 1
    return _ceil_divide(count, multiple) * multiple


def _phase_problems(config: RunConfig) -> Iterator[Problem]:
    previous = 0
    for position, phase in enumerate(config.phases):
        field = f"phases.{position}.until_step"
        is_last = position == len(config.phases) - 1
        if phase.until_step is None:
            if not is_last:
                yield field, f"phase `{phase.name}` has no end, but only the last phase may go on until the end"
            continue
        if phase.until_step <= previous:
            yield field, f"{phase.until_step} is not after the phase before it, which lasts until step {previous}"
        if is_last and phase.until_step < config.steps:
            yield (
                field,
                f"no phase covers steps {phase.until_step + 1} to {config.steps}; use null, or lower `steps`",
            )
        previous = max(previous, phase.until_step)


def _objective_problems(config: RunConfig, phases: list[PhaseSteps]) -> list[Problem]:
    """What an advantage or a loss cannot work with, as their classes say; once for all steps of a phase."""
    problems = (
        problem
        for position, phase in enumerate(phases)
        for form in phase.forms
        for objective in form.objectives.values()
        for problem in _problems_of(objective, f"phases.{position}", config)
    )
    return list(dict.fromkeys(problems))


def _problems_of(objective: ObjectiveConfig, where: str, config: RunConfig) -> Iterator[Problem]:
    advantage, loss = objective.advantage, objective.loss
    if advantage.compares_samples and config.rollout.samples_per_prompt == 1:
        yield (
            f"{where}, rollout.samples_per_prompt",
            f"the advantage `{advantage.name}` compares the samples of one prompt, so at least 2 are needed",
        )
    if advantage.ignores_penalties and objective.kl is not None and objective.kl.reward_coefficient > 0:
        yield (
            f"{where}, kl.reward_coefficient",
            f"the advantage `{advantage.name}` does not look at penalties in the reward; use "
            "kl.loss_coefficient, or another advantage",
        )
    if loss.on_policy_only and config.actor.optimizer_steps_per_rollout > 1:
        yield (
            f"{where}, actor.mini_batches_per_rollout, actor.epochs_per_rollout",
            f"the loss `{loss.name}` is for one optimizer step per rollout batch, this run takes "
            f"{config.actor.optimizer_steps_per_rollout}; choose a loss with a ratio (dual_clip), or one step",
        )


def _batch_problems(config: RunConfig, world_size: int, prompts: int | None) -> Iterator[Problem]:
    rollout, parts = config.rollout, config.actor.mini_batches_per_rollout
    replicas = max(1, world_size // config.parallel.model_parallel_size)
    if rollout.prompts_per_step % parts:
        yield (
            "rollout.prompts_per_step, actor.mini_batches_per_rollout",
            f"{rollout.prompts_per_step} prompts cannot be divided into {parts} mini-batches of whole groups",
        )
    elif rollout.prompts_per_step * rollout.samples_per_prompt // parts < replicas:
        yield (
            "rollout.prompts_per_step, rollout.samples_per_prompt",
            f"{rollout.prompts_per_step * rollout.samples_per_prompt // parts} samples per optimizer step leave "
            f"some of the {replicas} data-parallel replicas without any; sample more or use fewer processes",
        )
    if prompts is not None and prompts < rollout.prompts_per_step:
        yield (
            "data.source, rollout.prompts_per_step",
            f"the training set has only {prompts} prompts for {rollout.prompts_per_step} per step; lower the latter",
        )
    if rollout.sample_ahead and not config.engine.urls:
        yield (
            "rollout.sample_ahead, engine.urls",
            "engines that share the trainer's devices cannot sample while it trains; start servers elsewhere and name "
            "them in engine.urls, or turn sample_ahead off",
        )
    if rollout.top_k == 0:
        yield "rollout.top_k", "0 would leave no token to sample; use -1 to turn top-k off"


def _time_problems(config: RunConfig) -> Iterator[Problem]:
    """While rank 0 samples and evaluates, the other ranks wait in a collective, which must not give up first."""
    rounds = config.rollout.max_batches
    batches = rounds + len(config.evaluation.sets)
    longest = config.rollout.step_timeout_seconds * batches
    if config.parallel.collective_timeout_seconds <= longest:
        yield (
            "parallel.collective_timeout_seconds, rollout.step_timeout_seconds",
            f"a step may sample {batches} batches ({rounds} to train on, {batches - rounds} to evaluate) of at most "
            f"{config.rollout.step_timeout_seconds:g} s each, so collectives must wait longer than {longest:g} s; "
            "raise the first or lower the second",
        )


def _routing_problems(config: RunConfig, shape: ModelShape | None) -> Iterator[Problem]:
    if config.rollout.routing_replay and shape and not 0 < shape.experts <= MAX_REPLAYED_EXPERTS:
        yield (
            "rollout.routing_replay",
            f"the model has {shape.experts or 'no'} experts, it is for 1 to {MAX_REPLAYED_EXPERTS}; set it to false",
        )
    if shape and not shape.experts and config.model.router != RouterConfig():
        yield "model.router", "is for a mixture of experts, but the model has none; leave the section out"


def _length_problems(config: RunConfig, shape: ModelShape | None) -> Iterator[Problem]:
    """Prompt plus response, for training and every evaluation set, within the model's and the engine's limits."""
    engine, overlong = config.engine, config.reward.overlong
    if overlong is not None and overlong.buffer_tokens > config.rollout.max_response_tokens:
        yield (
            "reward.overlong.buffer_tokens, rollout.max_response_tokens",
            f"the last {overlong.buffer_tokens} of {config.rollout.max_response_tokens} tokens would punish every "
            "response; lower the former",
        )
    limits = [
        ("engine.max_context_tokens", engine.max_context_tokens),
        ("engine.max_total_tokens", engine.max_total_tokens),
        ("model.path (max_position_embeddings of its config.json)", shape.context_tokens if shape else None),
    ]
    sets: list[tuple[str, PromptSetConfig]] = [("data", config.data)]
    sets += [(f"evaluation.sets.{position}", prompts) for position, prompts in enumerate(config.evaluation.sets)]
    for section, prompts in sets:
        longest = prompts.max_prompt_tokens + config.rollout.max_response_tokens
        for limiting_field, limit in limits:
            if limit is not None and longest > limit:
                yield (
                    f"{section}.max_prompt_tokens, rollout.max_response_tokens",
                    f"{prompts.max_prompt_tokens} + {config.rollout.max_response_tokens} = {longest} tokens do not fit "
                    f"into {limit}, the limit of {limiting_field}; lower the lengths or raise the limit",
                )
    if shape and engine.max_context_tokens and engine.max_context_tokens > shape.context_tokens:
        yield (
            "engine.max_context_tokens",
            f"{engine.max_context_tokens} is beyond the model's own {shape.context_tokens}; lower it or use null",
        )


def _ceil_divide(a: int, b: int) -> int:
    return -(-a // b)
