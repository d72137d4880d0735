"""Everything about a run that can be checked in a second, before Megatron or SGLang are even imported."""

from pathlib import Path

from megatron_dsrl.algorithms.passes import phase_passes
from megatron_dsrl.algorithms.schedule import Schedule
from megatron_dsrl.config.derived import RunFigures, derive
from megatron_dsrl.config.prompt_count import count_prompts
from megatron_dsrl.config.run import RunConfig
from megatron_dsrl.errors import UserError
from megatron_dsrl.hub import asking_hub
from megatron_dsrl.model.architecture import read_architecture


def preflight(config: RunConfig, world_size: int) -> RunFigures:
    """Check the run's layout against its model and data, and give its figures.

    Reads the model's config.json (of a hub model, only that file is fetched) and the size of a local prompt file.

    Raises:
        UserError: the model or a local prompt file is missing or unreadable, the architecture is not supported, or
            the layout does not fit; see `derive`. Also as `check_models`.
    """
    architecture = read_architecture(find_config_json(config.model.path).parent)
    figures = derive(config, world_size, architecture.shape, count_prompts(config.data))
    check_models(config)
    return figures


def check_models(config: RunConfig) -> None:
    """Whether the phases use what the configuration says of a critic and a reference policy.

    Raises:
        UserError: the critic is to warm up in a step that does not use it, its folder is missing, or there is no KL
            term for the reference policy.
    """
    schedule, critic = Schedule(config.phases), config.critic
    steps = range(1, config.steps + 1)
    for step in range(1, critic.warmup_steps + 1):
        if step > config.steps or not phase_passes(schedule.at(step)).values:
            raise UserError(
                f"critic.warmup_steps: is {critic.warmup_steps}, but no critic learns in step {step}; choose an "
                "advantage that needs values for its phase (gae), or set it to 0"
            )
    if critic.path is not None and not _may_be_hub_name(critic.path) and not Path(critic.path).expanduser().is_dir():
        raise UserError(f"critic.path: there is no folder {critic.path}; correct the path, or set it to null")
    refreshed = config.reference.refresh_at_phase_switch or config.reference.refresh_every_steps is not None
    if refreshed and not any(phase_passes(schedule.at(step)).reference_log_probs for step in steps):
        raise UserError("reference: no phase has a `kl` section, so there is no reference policy to refresh")


def find_config_json(path: str) -> Path:
    """The config.json of `model.path`: in a local folder, or of a hub model without its weights."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder / "config.json"
    if not _may_be_hub_name(path):
        raise UserError(f"model.path: there is no folder {path}; make or download the model first, or correct the path")
    return _fetch_config_json(path)


def _may_be_hub_name(path: str) -> bool:
    """`Qwen/Qwen3-8B` may be one; `./x`, `/x`, `a/b/c` and anything under an existing folder may not."""
    parts = path.split("/")
    return len(parts) == 2 and all(parts) and not path.startswith((".", "~")) and not Path(parts[0]).exists()


def _fetch_config_json(name: str) -> Path:
    """The cached or freshly fetched config.json of a hub model."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    cached = try_to_load_from_cache(name, "config.json")
    if isinstance(cached, str):
        return Path(cached)
    with asking_hub("model.path", name, "a folder nor a model"):
        return Path(hf_hub_download(name, "config.json", etag_timeout=10))
