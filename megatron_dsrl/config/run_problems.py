"""Conflicts in a run's configuration, or with the processes, the model or the prompts."""

from collections.abc import Iterator, Sequence

from megatron_dsrl.config.benchmark import repeated_greedy_samples
from megatron_dsrl.config.data import PromptSetConfig
from megatron_dsrl.config.engine_numerics import numerics_problems
from megatron_dsrl.config.layout import ModelShape, Problem, engine_problems, model_problems, process_problems
from megatron_dsrl.config.model import RouterConfig
from megatron_dsrl.config.phase import ObjectiveConfig, PhaseConfig, PhaseSteps
from megatron_dsrl.config.rollout import MAX_REPLAYED_EXPERTS
from megatron_dsrl.config.run import EvaluationSetConfig, RunConfig


def run_problems(
    config: RunConfig, phases: Sequence[PhaseSteps], world_size: int, shape: ModelShape | None, prompts: int | None
) -> list[Problem]:
    """Every conflict: its field or fields, and what to do.

    Args:
        phases: its phases by steps.
        world_size: number of processes.
        shape: the model's sizes; None leaves out the checks that need them.
        prompts: number of training prompts where known.
    """
    needs_engines = config.rollout.needs_engines
    return [
        *process_problems(config.parallel, world_size),
        *(engine_problems(config.engine.tensor_parallel_size, world_size, shape) if needs_engines else ()),
        *(() if config.rollout.source == "engine" else _dataset_problems(config, phases)),
        *_phase_problems(config.phases, config.steps),
        *_objective_problems(config, phases),
        *_batch_problems(config, world_size, prompts),
        *_evaluation_problems(config.evaluation.sets),
        *_time_problems(config),
        *_routing_problems(config, shape),
        *_lora_problems(config, shape),
        *numerics_problems(config.engine, config.rollout, config.model.dtype, shape),
        *_length_problems(config, shape),
        *(model_problems(config.parallel, shape) if shape else ()),
    ]


def _phase_problems(phases: Sequence[PhaseConfig], steps: int) -> Iterator[Problem]:
    previous = 0
    for position, phase in enumerate(phases):
        field = f"phases.{position}.until_step"
        is_last = position == len(phases) - 1
        if phase.until_step is None:
            if not is_last:
                yield field, f"phase `{phase.name}` has no end, but only the last phase may go on until the end"
            continue
        if phase.until_step <= previous:
            yield field, f"{phase.until_step} is not after the phase before it, which lasts until step {previous}"
        if is_last and phase.until_step < steps:
            yield (
                field,
                f"no phase covers steps {phase.until_step + 1} to {steps}; use null, or lower `steps`",
            )
        previous = max(previous, phase.until_step)


def _objective_problems(config: RunConfig, phases: Sequence[PhaseSteps]) -> list[Problem]:
    """Problems that the classes of advantages and losses report, once for all steps of a phase."""
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
            f"the advantage `{advantage.name}` ignores penalties in the reward; use "
            "kl.loss_coefficient, or another advantage",
        )
    if loss.on_policy_only and config.actor.optimizer_steps_per_rollout > 1:
        yield (
            f"{where}, actor.mini_batches_per_rollout, actor.epochs_per_rollout",
            f"the loss `{loss.name}` is for one optimizer step per rollout batch, this run takes "
            f"{config.actor.optimizer_steps_per_rollout}; choose a loss with a ratio (dual_clip), or one step",
        )


def _evaluation_problems(sets: Sequence[EvaluationSetConfig]) -> Iterator[Problem]:
    names = [one.name for one in sets]
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield "evaluation.sets", f"the name {name} is used more than once; rename one"
    for position, one in enumerate(sets):
        if problem := repeated_greedy_samples(one.temperature, one.samples_per_prompt):
            yield f"evaluation.sets.{position}.temperature, evaluation.sets.{position}.samples_per_prompt", problem


def _dataset_problems(config: RunConfig, phases: Sequence[PhaseSteps]) -> Iterator[Problem]:
    """A data set has one response per prompt, without a reward or an engine's log-probs."""
    rollout = config.rollout
    if rollout.samples_per_prompt != 1:
        yield (
            "rollout.source, rollout.samples_per_prompt",
            f"a data set has one response per prompt, not {rollout.samples_per_prompt}; set samples_per_prompt to 1",
        )
    if rollout.temperature != 1:
        yield (
            "rollout.source, rollout.temperature",
            f"the trainer would divide its logits by {rollout.temperature:g}; with a data set, set it to 1",
        )
    for position, phase in enumerate(phases):
        objectives = [objective for form in phase.forms for objective in form.objectives.values()]
        if any(objective.loss.vanishes_without_advantage for objective in objectives):
            yield (
                f"phases.{position}.loss",
                "needs advantages, but the responses of a data set have no rewards; use `loss: supervised`, as "
                "configs/methods/sft.yaml does",
            )
        if any(objective.importance_correction is not None for objective in objectives):
            yield (
                f"phases.{position}.importance_correction",
                "compares with the engine's log-probs, which a data set does not have; set it to null",
            )


def _batch_problems(config: RunConfig, world_size: int, prompts: int | None) -> Iterator[Problem]:
    rollout, parts = config.rollout, config.actor.mini_batches_per_rollout
    replicas = max(1, world_size // config.parallel.model_parallel_size)
    if rollout.prompts_per_step % parts:
        yield (
            "rollout.prompts_per_step, actor.mini_batches_per_rollout",
            f"{rollout.prompts_per_step} prompts cannot be divided into {parts} mini-batches of whole groups",
        )
    elif rollout.samples_per_step // parts < replicas:
        yield (
            "rollout.prompts_per_step, rollout.samples_per_prompt",
            f"{rollout.samples_per_step // parts} samples per optimizer step leave "
            f"some of the {replicas} data-parallel replicas without any; sample more or use fewer processes",
        )
    if prompts is not None and prompts < rollout.prompts_per_step:
        yield (
            "data.source, rollout.prompts_per_step",
            f"the training set has only {prompts} prompts for {rollout.prompts_per_step} per step; lower "
            "prompts_per_step",
        )
    if rollout.max_staleness and not config.engine.urls:
        yield (
            "rollout.max_staleness, engine.urls",
            "engines that share the trainer's devices cannot sample while it trains; start servers elsewhere and name "
            "them in engine.urls, or set max_staleness to 0",
        )
    if rollout.replay_from is not None and config.evaluation.sets:
        yield "rollout.replay_from, evaluation.sets", "a replay starts no engines, so it cannot evaluate; use no sets"
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
            f"the model has {shape.experts or 'no'} experts, this needs 1 to {MAX_REPLAYED_EXPERTS}; set it to false",
        )
    if shape and not shape.experts and config.model.router != RouterConfig():
        yield "model.router", "is for a mixture of experts, but the model has none; leave the section out"


def _lora_problems(config: RunConfig, shape: ModelShape | None) -> Iterator[Problem]:
    lora, reference = config.actor.lora, config.reference
    if lora is None:
        return
    experts = [name for name in ("gate_proj", "up_proj", "down_proj") if name in lora.target_modules]
    if shape and shape.experts and experts:
        yield (
            "actor.lora.target_modules",
            f"the model's feed-forward layers are experts, which get no adapters; leave out {', '.join(experts)}",
        )
    if config.model.random_init:
        yield (
            "actor.lora, model.random_init",
            "adapters are stored without the weights they were trained on, and random weights are not saved; start "
            "from a model with weights",
        )
    if reference.path is not None and (reference.refresh_at_phase_switch or reference.refresh_every_steps is not None):
        yield (
            "actor.lora, reference.path",
            "checkpoints with LoRA hold adapters only, not all weights of a refreshed reference; leave out path, or "
            "the refresh_ fields",
        )


def _length_problems(config: RunConfig, shape: ModelShape | None) -> Iterator[Problem]:
    """Prompt plus response, for training and every evaluation set, within the model's and the engine's limits."""
    engine, overlong = config.engine, config.reward.overlong
    if overlong is not None and overlong.buffer_tokens > config.rollout.max_response_tokens:
        yield (
            "reward.overlong.buffer_tokens, rollout.max_response_tokens",
            f"the last {overlong.buffer_tokens} of {config.rollout.max_response_tokens} tokens would penalise every "
            "response; lower buffer_tokens",
        )
    engine_limits = [
        ("engine.max_context_tokens", engine.max_context_tokens),
        ("engine.max_total_tokens", engine.max_total_tokens),
    ]
    limits = [
        *(engine_limits if config.rollout.needs_engines else ()),
        ("model.path (max_position_embeddings of its config.json)", shape.context_tokens if shape else None),
    ]
    extension = _possible_extension(shape)
    training = ("rollout.max_response_tokens", config.rollout.max_response_tokens)
    sets: list[tuple[str, PromptSetConfig, tuple[str, int]]] = [("data", config.data, training)]
    for position, held_out in enumerate(config.evaluation.sets):
        section, own = f"evaluation.sets.{position}", held_out.max_response_tokens
        sets.append((section, held_out, training if own is None else (f"{section}.max_response_tokens", own)))
    for section, prompts, (response_field, response_tokens) in sets:
        longest = prompts.max_prompt_tokens + response_tokens
        for limiting_field, limit in limits:
            if limit is not None and longest > limit:
                yield (
                    f"{section}.max_prompt_tokens, {response_field}",
                    f"{prompts.max_prompt_tokens} + {response_tokens} = {longest} tokens do not fit "
                    f"into {limit}, the limit of {limiting_field}; lower the lengths or raise the limit{extension}",
                )
    if shape and engine.max_context_tokens and engine.max_context_tokens > shape.context_tokens:
        yield (
            "engine.max_context_tokens",
            f"{engine.max_context_tokens} is beyond the model's own {shape.context_tokens}; lower it or use null"
            f"{extension}",
        )


def _possible_extension(shape: ModelShape | None) -> str:
    """Additional advice if a model's YaRN scaling reaches further than its max_position_embeddings; else empty."""
    if shape is None or shape.yarn_context_tokens <= shape.context_tokens:
        return ""
    return (
        f". The YaRN scaling in config.json reaches {shape.yarn_context_tokens} tokens: set max_position_embeddings to "
        "that"
    )
