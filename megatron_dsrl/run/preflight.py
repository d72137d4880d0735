"""Everything about a run that can be checked in a second, before Megatron or SGLang is imported."""

from pathlib import Path

from megatron_dsrl.algorithms.schedule import Schedule, passes_of_phase
from megatron_dsrl.common.errors import UserError
from megatron_dsrl.common.temporary_folder import require_short_temporary_folder
from megatron_dsrl.config.derived import RunFigures, derive
from megatron_dsrl.config.prompt_count import count_training_prompts
from megatron_dsrl.config.run import RunConfig
from megatron_dsrl.model.architecture import read_architecture
from megatron_dsrl.model.source import find_config_json, is_hub_name, no_folder


def preflight(config: RunConfig, world_size: int) -> RunFigures:
    """Check the run's layout against its model and data, and derive its figures.

    Reads only the model's config.json and the size of a local prompt file.

    Raises:
        UserError: the model or a local prompt file is missing or unreadable, the architecture is not supported, the
            layout does not fit (see `derive` and `check_models`), or the temporary folder's name is too long.
    """
    require_short_temporary_folder()
    architecture = read_architecture(find_config_json(config.model.path, config.made_by).parent)
    figures = derive(config, world_size, architecture.shape, count_training_prompts(config.data, config.made_by))
    check_models(config)
    return figures


def check_models(config: RunConfig) -> None:
    """Check that the phases use the configured critic and reference policy.

    Raises:
        UserError: the critic's warm-up includes a step that does not use it, its folder is missing, or the reference
            policy is to be refreshed but no phase has a KL term.
    """
    schedule, critic = Schedule(config.phases), config.critic
    steps = range(1, config.steps + 1)
    for step in range(1, critic.warmup_steps + 1):
        if step > config.steps or not passes_of_phase(schedule.at(step)).values:
            raise UserError(
                f"critic.warmup_steps: is {critic.warmup_steps}, but no critic learns in step {step}; choose an "
                "advantage that needs values for its phase (gae), or set it to 0"
            )
    if critic.path is not None and not is_hub_name(critic.path) and not Path(critic.path).expanduser().is_dir():
        raise no_folder("critic.path", critic.path)
    refreshed = config.reference.refresh_at_phase_switch or config.reference.refresh_every_steps is not None
    if refreshed and not any(passes_of_phase(schedule.at(step)).reference_log_probs for step in steps):
        raise UserError("reference: no phase has a `kl` section, so the run has no reference policy to refresh")
