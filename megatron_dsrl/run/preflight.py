"""Everything about a run that can be checked in a second, before Megatron or SGLang is imported."""

from collections.abc import Mapping
from pathlib import Path

from megatron_dsrl.algorithms.schedule import Schedule, passes_of_phase
from megatron_dsrl.common.errors import UserError
from megatron_dsrl.common.temporary_folder import require_temporary_folder
from megatron_dsrl.config.data import DataConfig
from megatron_dsrl.config.run import RunConfig
from megatron_dsrl.config.summary import RunFigures, derive
from megatron_dsrl.data.rows import count_rows
from megatron_dsrl.model.architecture import (
    CRITIC_MAY_DIFFER,
    REFERENCE_MAY_DIFFER,
    check_same_architecture,
    read_architecture,
)
from megatron_dsrl.model.source import find_config_json, how_to_make, is_hub_name, no_folder


def preflight(config: RunConfig, world_size: int) -> RunFigures:
    """Check the run's layout against its model and data, and derive its figures.

    Reads only config.json of local models, and counts the rows of local prompt files. Raises UserError if a model or a
    local prompt file is missing or unreadable, the architecture is not supported, the critic's or reference's differs,
    the layout does not fit (see `derive` and `check_models`), or the temporary folder cannot be used.
    """
    require_temporary_folder()
    architecture = read_architecture(find_config_json(config.model.path, config.made_by).parent)
    figures = derive(config, world_size, architecture.shape, count_training_prompts(config.data, config.made_by))
    for position, held_out in enumerate(config.evaluation.sets):  # all must exist
        count_rows(held_out, f"evaluation.sets.{position}", how_to_make(held_out.source, config.made_by))
    check_models(config)
    for field, path, may_differ in (
        ("critic.path", config.critic.path, CRITIC_MAY_DIFFER),
        ("reference.path", config.reference.path, REFERENCE_MAY_DIFFER),
    ):
        if path is None:
            continue
        folder = Path(path).expanduser()
        if folder.is_dir():
            check_same_architecture(field, folder, architecture, may_differ)
        elif not is_hub_name(path):
            raise no_folder(field, path)
    return figures


def check_models(config: RunConfig) -> None:
    """Check that the phases use the configured critic and reference policy. Raises UserError if the critic's warm-up
    includes a step that does not use it, or the reference policy is configured but no phase has one."""
    schedule, critic = Schedule(config.phases), config.critic
    steps = range(1, config.steps + 1)
    for step in range(1, critic.warmup_steps + 1):
        if step > config.steps or not passes_of_phase(schedule.at(step)).values:
            raise UserError(
                f"critic.warmup_steps: is {critic.warmup_steps}, but no critic learns in step {step}; choose an "
                "advantage that needs values for its phase (gae), or set it to 0"
            )
    reference = config.reference
    configured = reference.model_dump(exclude_defaults=True)
    if configured and not any(passes_of_phase(schedule.at(step)).reference_log_probs for step in steps):
        raise UserError(
            "reference: no phase has a `kl` section or the advantage `distillation`, so the run has no reference "
            f"policy; leave out {', '.join(configured)}"
        )
    if reference.url is not None and config.rollout.temperature != 1:
        raise UserError(
            f"reference.url: a server's log-probs are at temperature 1, but rollout.temperature is "
            f"{config.rollout.temperature:g}; set it to 1"
        )


def check_weight_files(config: RunConfig) -> None:
    """Check the weights of local models by their files' headers. Takes seconds, to import torch. Raises UserError if
    weights of the policy or of its reference are missing, damaged or those of a different model."""
    folder = Path(config.model.path).expanduser()
    if not folder.is_dir():
        return
    from megatron_dsrl.weights.checkpoint_shapes import check_weights
    from megatron_dsrl.weights.table import weight_table

    table = weight_table(read_architecture(folder))
    if not config.model.random_init:
        check_weights(folder, table)
    if config.reference.path is not None and (reference := Path(config.reference.path).expanduser()).is_dir():
        check_weights(reference, table)


def count_training_prompts(data: DataConfig, made_by: Mapping[str, str] = {}) -> int | None:
    """Rows of the training set, at most `data.limit`; None if they must be loaded to be counted, and for a mixture,
    whose sets have their own epochs, and for filtered prompts. Raises UserError if a local file is missing, unreadable
    or empty."""
    counts = [
        count_rows(one, section, how_to_make(one.source, made_by)) for section, one in data.sets_by_section.items()
    ]  # all must exist
    return None if len(counts) > 1 or data.filters_by_pass_rate else counts[0]
