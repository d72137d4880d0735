"""The model that a run began with: its name on the hub, and its license."""

from pathlib import Path

import yaml

from megatron_dsrl.common.errors import UserError
from megatron_dsrl.model.source import hub_name_of, is_hub_name
from megatron_dsrl.weights.checkpoint_record import read_record

LICENSE_FIELDS = ("license", "license_name", "license_link")


def base_model_name(path: str) -> str | None:
    """The hub's name of the model that a run began with; None if it is not known to come from the hub.

    Args:
        path: `model.path` of the run: a hub name, a snapshot in the hub's cache, or a folder that `dsrl convert` has
            made from either.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        return path if is_hub_name(path) else None
    if name := hub_name_of(folder):
        return name
    try:
        record = read_record(folder)
    except UserError:
        return None
    return base_model_name(record.source) if record and record.source != path else None


def license_of(folder: Path) -> dict[str, str]:
    """License fields of a model card; empty if it has none."""
    try:
        text = (folder / "README.md").read_text(encoding="utf-8")
        fields = yaml.safe_load(text.split("---")[1]) if text.startswith("---") else {}
    except (OSError, ValueError, IndexError, yaml.YAMLError):
        return {}
    return {key: str(fields[key]) for key in LICENSE_FIELDS if isinstance(fields, dict) and key in fields}
