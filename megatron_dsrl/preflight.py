"""Everything about a run that can be checked in a second, before Megatron or SGLang are even imported."""

from pathlib import Path

from megatron_dsrl.config.derived import RunFigures, derive
from megatron_dsrl.config.prompt_count import count_prompts
from megatron_dsrl.config.run import RunConfig
from megatron_dsrl.errors import UserError
from megatron_dsrl.model.architecture import read_architecture


def preflight(config: RunConfig, world_size: int) -> RunFigures:
    """Check the run's layout against its model and data, and give its figures.

    Reads the model's config.json (of a hub model, only that file is fetched) and the size of a local prompt file.

    Raises:
        UserError: the model or a local prompt file is missing or unreadable, the architecture is not supported, or
            the layout does not fit; see `derive`.
    """
    architecture = read_architecture(find_config_json(config.model.path).parent)
    return derive(config, world_size, architecture.shape, count_prompts(config.data))


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
    try:
        return Path(hf_hub_download(name, "config.json", etag_timeout=10))
    except Exception as error:  # the hub client raises many unrelated types for one meaning: not to be had
        raise UserError(
            f"model.path: {name} is no local folder, and it could not be fetched as a hub model "
            f"({type(error).__name__}); download it first, or give the path of a folder"
        ) from error
