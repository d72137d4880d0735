"""What a configuration amounts to on a given number of processes, and the dry run's output, which shows it.

The figures are pure functions of the configuration, the world size, the model's sizes and the number of training
prompts. Token counts are upper bounds: every prompt at `data.max_prompt_tokens`, every response at
`rollout.max_response_tokens`.
"""

import math
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from megatron_dsrl.common.errors import UserError
from megatron_dsrl.common.numbers import counted
from megatron_dsrl.config.layout import ModelShape
from megatron_dsrl.config.load import format_config
from megatron_dsrl.config.phase import PhaseSteps, phases_by_steps
from megatron_dsrl.config.rollout import RolloutConfig
from megatron_dsrl.config.run import RunConfig
from megatron_dsrl.config.run_problems import run_problems


@dataclass(frozen=True)
class PhaseFigures(PhaseSteps):
    """One phase as it will run."""

    space: str
    """Spaces of all objectives at the phase's first step."""
    max_tokens_per_step: int
    """Upper bound of the tokens that go through the trainer in one step, all samples kept."""
    full_length_micro_batches: int
    """Micro-batches of one model replica in one optimizer step when every sample is kept and has full length."""


@dataclass(frozen=True)
class RunFigures:
    """The derived figures of a run."""

    world_size: int
    data_parallel_size: int
    """Copies of the model that train side by side."""
    engines: int
    """SGLang servers; 0 if nothing is sampled."""
    samples_per_step: int
    samples_per_optimizer_step: int
    optimizer_steps: int
    """Over the whole run."""
    max_generated_tokens_per_step: int
    longest_sequence: int
    """Prompt plus response, in tokens."""
    phases: tuple[PhaseFigures, ...]
    prompts: int | None
    """Training prompts; None when not known before the run."""
    epochs: float | None
    """Passes over the training prompts in the whole run."""


def derive(config: RunConfig, world_size: int, shape: ModelShape | None, prompts: int | None = None) -> RunFigures:
    """Check a run's layout and return its figures. Raises UserError, which lists every field that does not fit, and
    what to do.

    Args:
        world_size: number of processes (one per GPU).
        shape: the model's sizes; None leaves out the checks that need them.
        prompts: number of training prompts where known.
    """
    phases = list(phases_by_steps(config.phases, config.steps))
    problems = run_problems(config, phases, world_size, shape, prompts)
    if problems:
        title = f"run `{config.name}` on {counted(world_size, 'process')}: {counted(len(problems), 'problem')}"
        raise UserError("\n".join([title, *(f"  {fields}: {what}" for fields, what in problems)]))
    return _figures(config, phases, world_size, prompts)


def _figures(config: RunConfig, phases: list[PhaseSteps], world_size: int, prompts: int | None) -> RunFigures:
    rollout, samples = config.rollout, config.rollout.samples_per_step
    engines = len(config.engine.urls) or world_size // config.engine.tensor_parallel_size
    data_parallel_size = world_size // config.parallel.model_parallel_size
    return RunFigures(
        world_size=world_size,
        data_parallel_size=data_parallel_size,
        engines=engines if rollout.needs_engines else 0,
        samples_per_step=samples,
        samples_per_optimizer_step=samples // config.actor.mini_batches_per_rollout,
        optimizer_steps=config.steps * config.actor.optimizer_steps_per_rollout,
        max_generated_tokens_per_step=samples * rollout.max_response_tokens if rollout.needs_engines else 0,
        longest_sequence=config.longest_sequence,
        phases=tuple(_phase_figures(config, phase, data_parallel_size) for phase in phases),
        prompts=prompts,
        epochs=None if prompts is None else config.steps * rollout.prompts_per_step / prompts,
    )


def _phase_figures(config: RunConfig, phase: PhaseSteps, data_parallel_size: int) -> PhaseFigures:
    samples = config.rollout.samples_per_step
    replica_samples = _ceil_divide(samples // config.actor.mini_batches_per_rollout, data_parallel_size)
    spaces = [[objective.space for objective in form.objectives.values()] for form in phase.forms]
    prompt, response = config.data.max_prompt_tokens, config.rollout.max_response_tokens
    lengths = [[space.max_context_tokens(prompt) + response for space in form_spaces] for form_spaces in spaces]
    return PhaseFigures(
        **vars(phase),
        space=" + ".join(space.name for space in spaces[0]),
        max_tokens_per_step=samples * max(map(sum, lengths)),
        full_length_micro_batches=max(
            sum(_micro_batches(config, replica_samples, length) for length in form_lengths) for form_lengths in lengths
        ),
    )


def _micro_batches(config: RunConfig, samples: int, length: int) -> int:
    """How many one replica needs for samples of this length. Context parallelism pads each sample; the interleaved
    schedule pads their number."""
    parallel = config.parallel
    multiple = 2 * parallel.context_parallel_size if parallel.context_parallel_size > 1 else 1
    padded = _ceil_divide(length, multiple) * multiple
    count = _ceil_divide(samples, max(1, config.actor.max_tokens_per_micro_batch // padded))
    multiple = parallel.pipeline_parallel_size if parallel.virtual_pipeline_stages > 1 else 1
    return _ceil_divide(count, multiple) * multiple


def _ceil_divide(a: int, b: int) -> int:
    return -(-a // b)


def print_dry_run(config: RunConfig, figures: RunFigures, console: Console) -> None:
    """Print the resolved YAML, the run's figures and its phases."""
    console.rule("resolved configuration")
    # Neither wrapped nor coloured: it can be copied into a file as it stands.
    console.print(format_config(config), soft_wrap=True, markup=False, highlight=False)
    console.rule("derived figures")
    console.print(_figures_table(config, figures))
    console.print(_phases_table(figures))
    for warning in sampling_warnings(config.rollout):
        console.print(warning, markup=False, highlight=False)


def batch_lines(config: RunConfig, figures: RunFigures) -> list[str]:
    """Lines that explain the batch sizes at the start of a run."""
    actor, parallel = config.actor, config.parallel
    per_phase = ", ".join(
        f"{phase.full_length_micro_batches} ({phase.name})" for phase in figures.phases if phase.steps
    )
    layout = "" if figures.world_size == 1 else (
        f" = {figures.data_parallel_size} data-parallel x {parallel.tensor_parallel_size} tensor x "
        f"{parallel.pipeline_parallel_size} pipeline x {parallel.context_parallel_size} context"
    )  # fmt: skip
    split = "" if config.actor.optimizer_steps_per_rollout == 1 else (
        f" ({counted(actor.mini_batches_per_rollout, 'mini-batch')} x "
        f"{counted(actor.epochs_per_rollout, 'epoch')})"
    )  # fmt: skip
    return [
        f"every step: {_samples(config, figures)}; "
        f"{counted(config.actor.optimizer_steps_per_rollout, 'optimizer step')} of "
        f"{figures.samples_per_optimizer_step:,}{split}",
        f"layout: {counted(figures.world_size, 'process')}{layout}",
        f"micro-batches of up to {actor.max_tokens_per_micro_batch:,} tokens; per optimizer step, at full length: "
        f"{per_phase}",
    ]


def sampling_warnings(rollout: RolloutConfig) -> list[str]:
    """Why the engine samples from another distribution than the trainer scores; empty if it does not."""
    cuts = [f"rollout.top_p={rollout.top_p:g}"] if rollout.top_p < 1 else []
    cuts += [f"rollout.top_k={rollout.top_k}"] if rollout.top_k > 0 else []
    if not cuts:
        return []
    return [
        f"warning: {' and '.join(cuts)}: the engine never samples the tokens that this cuts off, but the trainer "
        f"scores with the whole distribution. Updates are off-policy{_how_far(rollout)}, and no metric shows it: the "
        "engine's log-probs are those of the whole distribution too. For on-policy training set top_p to 1 and top_k "
        "to -1"
    ]


def _how_far(rollout: RolloutConfig) -> str:
    """Nucleus sampling keeps at least the mass top_p, so no token becomes more likely than by 1 / top_p."""
    if rollout.top_p == 1 or rollout.top_k > 0:
        return ""
    return f" (sampled tokens were up to {1 / rollout.top_p:.2f} times as likely, {-math.log(rollout.top_p):.2f} nats)"


def _samples(config: RunConfig, figures: RunFigures) -> str:
    if config.rollout.source == "engine":
        return (
            f"{config.rollout.prompts_per_step:,} prompts x {config.rollout.samples_per_prompt} samples = "
            f"{figures.samples_per_step:,}"
        )
    epochs = "" if figures.epochs is None else f", {figures.epochs:.2f} epochs of {figures.prompts:,} in all"
    return f"{config.rollout.prompts_per_step:,} responses of the data set{epochs}"


def _figures_table(config: RunConfig, figures: RunFigures) -> Table:
    parallel, rollout, engine = config.parallel, config.rollout, config.engine
    tensor, pipeline = parallel.tensor_parallel_size, parallel.pipeline_parallel_size
    context, virtual = parallel.context_parallel_size, parallel.virtual_pipeline_stages
    engines = "engine.urls" if engine.urls else f"tensor-parallel size {engine.tensor_parallel_size} each"
    prompt, response = config.data.max_prompt_tokens, rollout.max_response_tokens
    budget = config.actor.max_tokens_per_micro_batch
    table = Table("figure", "value", "made of", show_header=True, header_style="bold")

    def row(name: str, value: int, origin: str) -> None:
        table.add_row(name, f"{value:,}", origin)

    row("processes", figures.world_size, "--processes, or WORLD_SIZE")
    of_model = f"tensor {tensor} x pipeline {pipeline} x context {context}"
    row("processes per model", parallel.model_parallel_size, of_model)
    row("chunks of layers", pipeline * virtual, f"pipeline {pipeline} x virtual stages {virtual}")
    of_experts = (
        f"expert {parallel.expert_parallel_size} x expert tensor {parallel.split_of_experts} x pipeline {pipeline}"
    )
    row("processes per copy of all experts", parallel.expert_model_parallel_size, of_experts)
    row("data-parallel size", figures.data_parallel_size, "processes / processes per model")
    row("SGLang engines", figures.engines, engines if rollout.needs_engines else "nothing is sampled")
    samples = f"{rollout.prompts_per_step} prompts x {rollout.samples_per_prompt} samples"
    row("samples per step", figures.samples_per_step, samples)
    updates = f"{counted(config.actor.optimizer_steps_per_rollout, 'optimizer step')} per rollout"
    row("samples per optimizer step", figures.samples_per_optimizer_step, updates)
    row("optimizer steps", figures.optimizer_steps, f"{config.steps} steps in all")
    row("longest sequence, tokens", figures.longest_sequence, f"prompt {prompt} + response {response}")
    row("generated tokens per step, at most", figures.max_generated_tokens_per_step, "samples x response limit")
    row("token budget of a micro-batch", budget, "actor.max_tokens_per_micro_batch")
    epochs = "unknown" if figures.epochs is None else f"{figures.epochs:.2f}"
    prompts = "unknown before the run" if figures.prompts is None else f"{figures.prompts:,} training prompts"
    table.add_row("epochs", epochs, prompts)
    return table


def _phases_table(figures: RunFigures) -> Table:
    table = Table(
        "phase", "space", "steps", "from - to", "trained tokens per step, at most", "micro-batches at full length",
        title="phases",
    )  # fmt: skip
    for phase in figures.phases:
        span = f"{phase.first_step} - {phase.last_step}" if phase.steps else "not reached"
        table.add_row(
            phase.name,
            phase.space,
            str(phase.steps),
            span,
            f"{phase.max_tokens_per_step:,}",
            str(phase.full_length_micro_batches),
        )
    return table
