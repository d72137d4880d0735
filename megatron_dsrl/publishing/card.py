"""The model card (README.md) of a policy that a run has exported.

It is made from the run folder alone. Folders and addresses of the machines that made the run are left out.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path, PurePath
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Environment, PackageLoader, StrictUndefined

from megatron_dsrl.common.errors import UserError
from megatron_dsrl.common.generated_card import CARD_FILE, GENERATED, has_mark
from megatron_dsrl.config.benchmark import load_benchmark
from megatron_dsrl.evaluation.results import results_of_run
from megatron_dsrl.model.source import hub_name_of, is_hub_name
from megatron_dsrl.observability.records import CONFIG_FILE, EVALUATION_FILE, Record, read_records
from megatron_dsrl.provenance.differences import ALWAYS_SHOWN, starts_that_count
from megatron_dsrl.provenance.words import what_computed
from megatron_dsrl.run.results import exported_policy
from megatron_dsrl.weights.checkpoint_record import read_record

PAPER = "2604.14142"
SPACES = {"pre_train": "log P(y)", "post_train": "log P(y\\|x)"}
LEFT_OUT = ("output_dir", "checkpoint", "observability")
"""Sections of the configuration that say nothing about the model."""
MADE_BY = ("Commit", "Base model", "Training data", "Device", "Processes", "Layout", "Python", *ALWAYS_SHOWN)
"""Facts of the run's starts that a card shows."""
LICENSE_FIELDS = ("license", "license_name", "license_link")
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


@dataclass(frozen=True)
class CardEvaluation:
    """One benchmark or held-out set."""

    title: str
    dataset: str
    """Hub name if the benchmark comes from the hub, else its own name."""
    problems: int
    samples: int
    """Per problem: k of Avg@k."""
    accuracy: float
    standard_error: float | None
    before: float | None
    """Accuracy before training, if it was measured."""
    pass_at_k: float | None = None
    """With k = `samples`."""


def evaluations_of(run_folder: Path, step: int) -> list[CardEvaluation]:
    """Evaluations of the policy after a step: benchmarks of `dsrl eval`, then held-out sets from training.

    Raises:
        UserError: a file is damaged.
    """
    records = [one for one in read_records(run_folder / EVALUATION_FILE) if one.get("accuracy") is not None]
    before = {record["set"]: record["accuracy"] for record in records if record["step"] == 0}
    held_out = {record["set"]: _of_record(record, before) for record in records if record["step"] == step}
    return [*_benchmarks(run_folder, step), *held_out.values()]


def model_index(evaluations: Sequence[CardEvaluation]) -> list[EvalResult]:
    """The evaluations in the hub's format, in percent."""
    found = []
    for one in evaluations:
        metrics = {("accuracy", f"Avg@{one.samples}"): one.accuracy}
        if one.pass_at_k is not None and one.samples > 1:
            metrics["pass@k", f"Pass@{one.samples}"] = one.pass_at_k
        found += [
            EvalResult(
                task_type="text-generation",
                task_name="Text Generation",
                dataset_type=one.dataset,
                dataset_name=one.title,
                metric_type=kind,
                metric_name=name,
                metric_value=round(100 * value, 2),
            )
            for (kind, name), value in metrics.items()
        ]
    return found


def _of_record(record: Record, before: dict[str, float]) -> CardEvaluation:
    name, samples = record["set"], record["samples_per_prompt"]
    return CardEvaluation(
        title=name,
        dataset=name,
        problems=record["problems"],
        samples=samples,
        accuracy=record["accuracy"],
        standard_error=record.get("standard_error"),
        before=before.get(name),
    )


def _benchmarks(run_folder: Path, step: int) -> list[CardEvaluation]:
    found = {}
    for results in results_of_run(run_folder):
        if results.step != step:
            continue
        for name, summary in results.benchmarks.items():
            samples = summary["samples_per_prompt"]
            found[name] = CardEvaluation(
                title=summary["title"],
                dataset=_hub_name(name),
                problems=summary["problems"],
                samples=samples,
                accuracy=summary["accuracy"],
                standard_error=summary.get("standard_error"),
                before=None,
                pass_at_k=results.pass_at_k(name).get(samples),
            )
    return list(found.values())


def _hub_name(benchmark: str) -> str:
    """Hub name of a built-in benchmark; any other name unchanged."""
    try:
        return load_benchmark(benchmark, None).config.source
    except UserError:
        return benchmark


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
