"""Human-readable figures of a configuration on a given number of processes.

Pure functions of the configuration, the world size, the model's sizes and the number of training prompts. Token counts
are upper bounds: every prompt at `data.max_prompt_tokens`, every response at `rollout.max_response_tokens`.
"""

from dataclasses import dataclass

from megatron_dsrl.common.errors import UserError
from megatron_dsrl.config.layout import ModelShape, processes
from megatron_dsrl.config.phase import PhaseSteps, Space, phases_by_steps
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
    """Check a run's layout and give its figures.

    Args:
        world_size: number of processes (one per GPU).
        shape: the model's sizes; None leaves out the checks that need them.
        prompts: number of training prompts where known.

    Raises:
        UserError: lists every field that does not fit, and what to do.
    """
    phases = list(phases_by_steps(config.phases, config.steps))
    problems = run_problems(config, phases, world_size, shape, prompts)
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
        data_parallel_size=data_parallel_size,
        engines=_engines(config, world_size),
        samples_per_step=samples,
        samples_per_optimizer_step=samples // config.actor.mini_batches_per_rollout,
        optimizer_steps=config.steps * updates,
        max_generated_tokens_per_step=samples * rollout.max_response_tokens if rollout.needs_engines else 0,
        longest_sequence=config.data.max_prompt_tokens + rollout.max_response_tokens,
        phases=tuple(_phase_figures(config, phase, data_parallel_size) for phase in phases),
        prompts=prompts,
        epochs=None if prompts is None else config.steps * rollout.prompts_per_step / prompts,
    )


def _engines(config: RunConfig, world_size: int) -> int:
    if not config.rollout.needs_engines:
        return 0
    return len(config.engine.urls) or world_size // config.engine.tensor_parallel_size


def _phase_figures(config: RunConfig, phase: PhaseSteps, data_parallel_size: int) -> PhaseFigures:
    samples = config.rollout.prompts_per_step * config.rollout.samples_per_prompt
    replica_samples = _ceil_divide(samples // config.actor.mini_batches_per_rollout, data_parallel_size)
    spaces = [[objective.space for objective in form.objectives.values()] for form in phase.forms]
    lengths = [[_longest_sequence(config, space) for space in form_spaces] for form_spaces in spaces]
    return PhaseFigures(
        **vars(phase),
        space=" + ".join(space.name for space in spaces[0]),
        max_tokens_per_step=samples * max(map(sum, lengths)),
        full_length_micro_batches=max(
            sum(_micro_batches(config, replica_samples, length) for length in form_lengths) for form_lengths in lengths
        ),
    )


def _longest_sequence(config: RunConfig, space: Space) -> int:
    return space.max_context_tokens(config.data.max_prompt_tokens) + config.rollout.max_response_tokens


def _micro_batches(config: RunConfig, samples: int, length: int) -> int:
    """Tokens for one replica's samples of this length. Context parallelism pads each sample; the interleaved
    schedule pads their number."""
    parallel = config.parallel
    multiple = 2 * parallel.context_parallel_size if parallel.context_parallel_size > 1 else 1
    padded = _ceil_divide(length, multiple) * multiple
    count = _ceil_divide(samples, max(1, config.actor.max_tokens_per_micro_batch // padded))
    multiple = parallel.pipeline_parallel_size if parallel.virtual_pipeline_stages > 1 else 1
    return _ceil_divide(count, multiple) * multiple


def _ceil_divide(a: int, b: int) -> int:
    return -(-a // b)
