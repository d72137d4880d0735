"""The dry run's output: the resolved configuration and what it amounts to, as tables for people."""

import math

from rich.console import Console
from rich.table import Table

from megatron_dsrl.config.derived import RunFigures
from megatron_dsrl.config.layout import processes
from megatron_dsrl.config.load import format_config
from megatron_dsrl.config.rollout import RolloutConfig
from megatron_dsrl.config.run import RunConfig


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
        f" ({_counted(actor.mini_batches_per_rollout, 'mini-batch', 'mini-batches')} x "
        f"{_counted(actor.epochs_per_rollout, 'epoch', 'epochs')})"
    )  # fmt: skip
    return [
        f"every step: {_samples(config, figures)}; "
        f"{_counted(config.actor.optimizer_steps_per_rollout, 'optimizer step', 'optimizer steps')} of "
        f"{figures.samples_per_optimizer_step:,}{split}",
        f"layout: {processes(figures.world_size)}{layout}",
        f"micro-batches of up to {actor.max_tokens_per_micro_batch:,} tokens; per optimizer step, at full length: "
        f"{per_phase}",
    ]


def sampling_warnings(rollout: RolloutConfig) -> list[str]:
    """Why the samples do not come from the policy that the trainer scores, if they do not."""
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
    return f" (sampled tokens were up to {1 / rollout.top_p:.2f} times as likely, {-math.log(rollout.top_p):.2f} nat)"


def _samples(config: RunConfig, figures: RunFigures) -> str:
    if config.rollout.source == "engine":
        return (
            f"{config.rollout.prompts_per_step:,} prompts x {config.rollout.samples_per_prompt} samples = "
            f"{figures.samples_per_step:,}"
        )
    epochs = "" if figures.epochs is None else f", {figures.epochs:.2f} epochs of {figures.prompts:,} in all"
    return f"{config.rollout.prompts_per_step:,} responses of the data set{epochs}"


def _counted(count: int, one: str, several: str) -> str:
    return f"{count} {one if count == 1 else several}"


def _figures_table(config: RunConfig, figures: RunFigures) -> Table:
    parallel = config.parallel
    engines = "engine.urls" if config.engine.urls else f"tensor-parallel size {config.engine.tensor_parallel_size} each"
    if not config.rollout.needs_engines:
        engines = "nothing is sampled"
    table = Table("figure", "value", "made of", show_header=True, header_style="bold")
    rows: list[tuple[str, int, str]] = [
        ("processes", figures.world_size, "--processes, or WORLD_SIZE"),
        (
            "processes per model",
            parallel.model_parallel_size,
            f"tensor {parallel.tensor_parallel_size} x pipeline {parallel.pipeline_parallel_size} "
            f"x context {parallel.context_parallel_size}",
        ),
        (
            "chunks of layers",
            parallel.pipeline_parallel_size * parallel.virtual_pipeline_stages,
            f"pipeline {parallel.pipeline_parallel_size} x virtual stages {parallel.virtual_pipeline_stages}",
        ),
        (
            "processes per copy of all experts",
            parallel.expert_model_parallel_size,
            f"expert {parallel.expert_parallel_size} x expert tensor {parallel.split_of_experts} "
            f"x pipeline {parallel.pipeline_parallel_size}",
        ),
        ("data-parallel size", figures.data_parallel_size, "processes / processes per model"),
        ("SGLang engines", figures.engines, engines),
        (
            "samples per step",
            figures.samples_per_step,
            f"{config.rollout.prompts_per_step} prompts x {config.rollout.samples_per_prompt} samples",
        ),
        (
            "samples per optimizer step",
            figures.samples_per_optimizer_step,
            f"{config.actor.optimizer_steps_per_rollout} optimizer step(s) per rollout",
        ),
        ("optimizer steps", figures.optimizer_steps, f"{config.steps} steps in all"),
        (
            "longest sequence, tokens",
            figures.longest_sequence,
            f"prompt {config.data.max_prompt_tokens} + response {config.rollout.max_response_tokens}",
        ),
        ("generated tokens per step, at most", figures.max_generated_tokens_per_step, "samples x response limit"),
        ("token budget of a micro-batch", config.actor.max_tokens_per_micro_batch, "actor.max_tokens_per_micro_batch"),
    ]
    for name, value, origin in rows:
        table.add_row(name, f"{value:,}", origin)
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
