"""Find a model's files: a local folder, or the snapshot of a hub name.

`published/` holds the config.json of the Qwen3 sizes, so that plans and dry runs need no network. The values are from
the models' hub pages; tests compare the parameter counts with the published ones. Training reads the model itself.
"""

import re
from collections.abc import Mapping
from pathlib import Path

from megatron_dsrl.common.errors import UserError
from megatron_dsrl.common.hub import asking_hub, can_reach_hub

PUBLISHED = Path(__file__).parent / "published"
"""`<owner>/<name>/config.json`."""

_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
_CACHED = re.compile(r"models--(.+?)--(.+)")
"""Folder of a model in the hub's cache, in which its snapshots are."""
NOT_WEIGHTS = ["*.bin", "*.pth", "*.gguf", "original/*"]
"""Weights in formats other than safetensors."""


def is_hub_name(path: str) -> bool:
    """Whether a path that is not a folder may be a hub name: `Qwen/Qwen3-8B` may; `./x`, `/x`, `a/b/c`, `my models/x`
    and anything below an existing folder may not."""
    return _HUB_NAME.fullmatch(path) is not None and not Path(path).parent.exists()


def hub_name_of(folder: Path) -> str | None:
    """The hub's name of the model whose snapshot in the hub's cache this is; None for other folders."""
    cached = _CACHED.fullmatch(folder.resolve().parent.parent.name)
    return "/".join(cached.groups()) if cached else None


def no_folder(field: str, path: str, made_by: Mapping[str, str] = {}) -> UserError:
    """The error for a folder that does not exist; `field` is the configuration field or command-line argument."""
    advice = how_to_make(path, made_by) or "make or download the model first, or correct the path"
    return UserError(f"{field}: no such folder: {path}; {advice}")


def resolve_model_folder(path: str, field: str = "model.path", made_by: Mapping[str, str] = {}) -> Path:
    """The local folder of a model: the path itself, or the snapshot of that hub name, downloaded if necessary. Raises
    UserError if it is neither a folder nor a readable hub model.

    `field` is the configuration field or command-line argument, for messages; for `made_by` see `RunConfig`.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if not is_hub_name(path):
        raise no_folder(field, path, made_by)
    from huggingface_hub import snapshot_download

    with asking_hub(field, path):
        return Path(snapshot_download(path, ignore_patterns=NOT_WEIGHTS, local_files_only=not can_reach_hub()))


def find_config_json(path: str, made_by: Mapping[str, str] = {}) -> Path:
    """The config.json of a run's model, from the folder, the hub's cache, `published/` or the hub, in this order.
    Raises UserError if it is neither a folder nor a readable hub model."""
    folder, published = Path(path).expanduser(), PUBLISHED / path / "config.json"
    if folder.is_dir():
        return folder / "config.json"
    if not is_hub_name(path):
        raise no_folder("model.path", path, made_by)
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    if isinstance(cached := try_to_load_from_cache(path, "config.json"), str):
        return Path(cached)
    if published.is_file():
        return published
    with asking_hub("model.path", path):
        return Path(hf_hub_download(path, "config.json", etag_timeout=10, local_files_only=not can_reach_hub()))


def how_to_make(path: str, made_by: Mapping[str, str]) -> str | None:
    """What to tell the user of a missing path, such as "`bash examples/tiny_dsrl/run.sh` makes it"; None if no command
    is known."""
    places = [Path(path), *Path(path).parents]
    command = next((command for place, command in made_by.items() if Path(place) in places), None)
    return command and f"`{command}` makes it"
