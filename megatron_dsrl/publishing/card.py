"""The model card (README.md) of a policy that a run has exported.

It is made from the run folder alone. Folders and addresses of the machines that made the run are left out.
"""

import re
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path, PurePath
from typing import Any

import yaml
from huggingface_hub import ModelCardData
from jinja2 import Environment, PackageLoader, StrictUndefined

from megatron_dsrl.common.errors import UserError
from megatron_dsrl.common.generated_card import CARD_FILE, GENERATED, has_mark
from megatron_dsrl.model.source import is_hub_name
from megatron_dsrl.observability.records import CONFIG_FILE
from megatron_dsrl.provenance.differences import ALWAYS_SHOWN, starts_that_count
from megatron_dsrl.provenance.words import what_computed
from megatron_dsrl.publishing.base_model import base_model_name, license_of
from megatron_dsrl.publishing.card_evaluations import evaluations_of, model_index
from megatron_dsrl.run.results import exported_policy

PAPER = "2604.14142"
SPACES = {"pre_train": "log P(y)", "post_train": "log P(y\\|x)"}
LEFT_OUT = ("output_dir", "checkpoint", "observability")
"""Sections of the configuration that say nothing about the model."""
MADE_BY = ("Commit", "Base model", "Training data", "Device", "Processes", "Layout", "Python", *ALWAYS_SHOWN)
"""Facts of the run's starts that a card shows."""
_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://")


def write_card(folder: Path, run_folder: Path, step: int, report: Callable[[str], None]) -> None:
    """Write the card of the policy after a step into its HF folder, unless the user has put their own there.

    Args:
        report: called with a warning if the card cannot be written; the run continues.
    """
    try:
        if is_generated(folder):
            (folder / CARD_FILE).write_text(model_card(run_folder, step), encoding="utf-8")
    except Exception as error:
        report(f"warning: the model card {folder / CARD_FILE} could not be written: {error}")


def refresh_card(run_folder: Path, step: int, report: Callable[[str], None]) -> None:
    """Update the card of an exported policy with its evaluations; nothing if it was not exported."""
    if exported_policy(run_folder, step).is_dir():
        write_card(exported_policy(run_folder, step), run_folder, step, report)


def is_generated(folder: Path) -> bool:
    """Whether this program wrote the folder's card, or the folder has none."""
    card = folder / CARD_FILE
    return not card.exists() or has_mark(card)


def model_card(run_folder: Path, step: int, base_model: str | None = None) -> str:
    """The card's text: metadata for the hub, then Markdown.

    Args:
        base_model: the hub's name of the model that the run began with; None: found if possible.

    Raises:
        UserError: a file of the run is missing or damaged.
    """
    config = _read_config(run_folder)
    evaluations = evaluations_of(run_folder, step)
    name = f"{config.get('name', run_folder.name)}, step {step}"
    phases = [one for one in _phases(config, step) if one["first"] <= one["last"]]
    base_model = base_model or base_model_name(config["model"]["path"])
    in_pre_train_space = any(one["space"] == SPACES["pre_train"] for one in phases)
    samples = config.get("rollout", {}).get("source", "engine") == "engine"
    public = without_private_places({key: value for key, value in config.items() if key not in LEFT_OUT})
    environment = Environment(
        loader=PackageLoader("megatron_dsrl.publishing"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template("model_card.md.j2").render(
        metadata=_metadata(config, name, base_model, evaluations, in_pre_train_space),
        generated=GENERATED,
        name=name,
        base_model=base_model,
        config=public,
        config_text=yaml.safe_dump(public, sort_keys=False, allow_unicode=True),
        phases=phases,
        step=step,
        in_pre_train_space=in_pre_train_space,
        samples=samples,
        lora=config.get("actor", {}).get("lora"),
        method="reinforcement learning with verifiable rewards" if samples else "supervised fine-tuning",
        evaluations=evaluations,
        made_by=_made_by(run_folder, step),
    )


def _read_config(run_folder: Path) -> dict[str, Any]:
    file = run_folder / CONFIG_FILE
    try:
        config = yaml.safe_load(file.read_text(encoding="utf-8"))
        return {**config, "model": dict(config["model"]), "phases": list(config["phases"])}
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        raise UserError(f"{file} is not a run's configuration, which a model card is made from: {error!r}") from error


def _phases(config: Mapping[str, Any], step: int) -> list[dict[str, Any]]:
    """First and last step of every phase up to `step`, and what it updates; later ones end before they begin."""
    phases = config["phases"]
    ends = [0, *(min(step, phase.get("until_step") or step) for phase in phases)]
    return [
        {
            "name": phase.get("name", "?"),
            "first": before + 1,
            "last": end,
            "space": SPACES.get(_choice(phase, "space"), _choice(phase, "space")),
            **{field: _choice(phase, field) for field in ("advantage", "filter", "loss")},
            "coefficient": phase.get("coefficient", 1.0),
        }
        for phase, (before, end) in zip(phases, pairwise(ends), strict=True)
    ]


def _choice(phase: Mapping[str, Any], field: str) -> str:
    """The name of a phase's choice."""
    value = phase.get(field, "default")
    return str(value.get("name", "?") if isinstance(value, Mapping) else value)


def _metadata(
    config: Mapping[str, Any], name: str, base_model: str | None, evaluations: list, in_pre_train_space: bool
) -> str:
    """The YAML front matter, written by the hub's own library."""
    source = str(config.get("data", {}).get("source", ""))
    license_fields: dict[str, Any] = {**license_of(Path(config["model"]["path"]).expanduser())}
    data = ModelCardData(
        base_model=base_model,
        datasets=[source] if is_hub_name(source) else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["reinforcement-learning", "megatron-dsrl", *([f"arxiv:{PAPER}"] if in_pre_train_space else [])],
        model_name=name if evaluations else None,
        eval_results=model_index(evaluations) or None,
        **license_fields,
    )
    return data.to_yaml()


def _made_by(run_folder: Path, step: int) -> list[tuple[str, str]]:
    """Code, machine and packages of the starts that the policy comes from; empty if they are not recorded."""
    facts: dict[str, list[str]] = {}
    for start in starts_that_count(run_folder, step):
        said = what_computed(without_private_places(start))
        for name in MADE_BY:
            value = said.get(name, "not recorded")
            value = "unknown" if value.startswith("unknown") else value
            if value not in facts.setdefault(name, []):
                facts[name].append(value)
    return [(name.removeprefix("Package "), ", then ".join(values)) for name, values in facts.items()]


def without_private_places(value: Any) -> Any:
    """The same, but with absolute paths shortened to their last part, and without server addresses."""
    if isinstance(value, dict):
        return {key: without_private_places(child) for key, child in value.items()}
    if isinstance(value, list):
        return [without_private_places(child) for child in value]
    if isinstance(value, str) and value.startswith(("/", "~")):
        return PurePath(value).name
    if isinstance(value, str) and _ADDRESS.match(value):
        return "(an address)"
    return value
