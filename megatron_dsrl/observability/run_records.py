"""A run folder read back: its configuration, records and phases."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from megatron_dsrl.common.errors import UserError
from megatron_dsrl.observability.records import CONFIG_FILE, EVALUATION_FILE, METRICS_FILE, Record, read_records

PRE_TRAIN = "pre_train"
"""The `space` of a step record that updates log P(y) alone."""
PRE_TRAIN_COLOURS, OTHER_COLOURS = (1, 5), (2, 3, 4, 6)
"""Colours of phases: warm where log P(y) is updated, cool elsewhere, so that the space is visible."""


@dataclass(frozen=True)
class PhaseSpan:
    """Consecutive steps of one phase."""

    name: str
    first_step: int
    last_step: int
    colour: int
    """Counted from 1; the number of the CSS class `phase-N`."""


@dataclass(frozen=True)
class RunRecords:
    """What one run has recorded so far; every part but the folder may be missing."""

    folder: Path
    name: str
    config_text: str
    config: dict[str, Any]
    """The resolved configuration; empty when config.yaml is missing."""
    steps: list[Record]
    """One per step, ascending."""
    evaluations: dict[str, list[Record]]
    """Accuracies by set name; ascending steps, the last record of a step wins."""
    held_out_losses: dict[str, list[Record]]
    """The same for sets whose loss was measured (`run/held_out.py`)."""
    phases: list[PhaseSpan]

    @property
    def last_written(self) -> datetime | None:
        """When the last step record was written; UTC. None without steps."""
        return datetime.fromtimestamp(self.steps[-1]["time"], UTC) if self.steps else None

    @property
    def total_steps(self) -> int | None:
        """Steps that the configuration asks for; None when unknown."""
        return self.config.get("steps")

    @property
    def step_numbers(self) -> tuple[int, ...]:
        """The recorded steps, ascending."""
        return tuple(record["step"] for record in self.steps)

    def column(self, key: str) -> tuple[float | None, ...]:
        """One key over all steps; None if it is absent or null."""
        return tuple(record.get(key) for record in self.steps)

    def known(self, key: str) -> list[float]:
        """The values of a column that are not None."""
        return [value for value in self.column(key) if value is not None]


def read_run(folder: Path) -> RunRecords:
    """Read a run folder, even while the run is still going.

    Raises UserError when the folder is missing, is not a run folder or holds damaged files.
    """
    _check_run_folder(folder)
    text, config = _read_config(folder / CONFIG_FILE)
    steps = sorted({record["step"]: record for record in read_records(folder / METRICS_FILE)}.values(), key=_step)
    evaluations = read_records(folder / EVALUATION_FILE)
    return RunRecords(
        folder=folder,
        name=str(config.get("name", folder.resolve().name)),
        config_text=text,
        config=config,
        steps=steps,
        evaluations=_by_set([record for record in evaluations if "loss" not in record]),
        held_out_losses=_by_set([record for record in evaluations if "loss" in record]),
        phases=_phase_spans(steps, phase_colours([steps])),
    )


def with_common_colours(runs: Sequence[RunRecords]) -> list[RunRecords]:
    """The runs, each phase shaded with the same colour in all of them."""
    colours = phase_colours([run.steps for run in runs])
    return [replace(run, phases=_phase_spans(run.steps, colours)) for run in runs]


def phase_colours(runs: Iterable[Sequence[Record]]) -> dict[str, int]:
    """Numbers of `phase-N` classes by phase name, in the order of first appearance in the runs' step records.

    With more phases than colours, colours repeat.
    """
    colours: dict[str, int] = {}
    used: Counter[tuple[int, ...]] = Counter()
    for record in (record for steps in runs for record in steps):
        if record["phase"] not in colours:
            palette = PRE_TRAIN_COLOURS if record.get("space") == PRE_TRAIN else OTHER_COLOURS
            colours[record["phase"]] = palette[used[palette] % len(palette)]
            used[palette] += 1
    return colours


def _phase_spans(steps: Sequence[Record], colours: Mapping[str, int]) -> list[PhaseSpan]:
    """Consecutive steps of the same phase."""
    spans: list[PhaseSpan] = []
    for record in steps:
        step, name = record["step"], record["phase"]
        if spans and spans[-1].name == name:
            spans[-1] = replace(spans[-1], last_step=step)
        else:
            spans.append(PhaseSpan(name, step, step, colours[name]))
    return spans


def _check_run_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise UserError(f"No such folder: {folder}. Give the folder of a run, <output_dir>/<name>.")
    if _looks_like_run(folder):
        return
    runs = sorted(child.name for child in folder.iterdir() if child.is_dir() and _looks_like_run(child))
    hint = f" It contains the runs {', '.join(runs[:5])}." if runs else ""
    raise UserError(
        f"{folder} is not a run folder: it has neither {CONFIG_FILE} nor {METRICS_FILE}.{hint}"
        " Give the folder of a run, <output_dir>/<name>."
    )


def _looks_like_run(folder: Path) -> bool:
    return (folder / CONFIG_FILE).is_file() or (folder / METRICS_FILE).is_file()


def _read_config(path: Path) -> tuple[str, dict[str, Any]]:
    if not path.is_file():
        return "", {}
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        config = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {error}. Restore it, or move it away to go without it.") from error
    if not isinstance(config, dict):
        raise UserError(f"{path} is not a configuration: a mapping is expected. Restore it, or move it away.")
    return text, config


def _by_set(records: Sequence[Record]) -> dict[str, list[Record]]:
    sets: dict[str, dict[int, Record]] = {}
    for record in records:
        sets.setdefault(record["set"], {})[record["step"]] = record
    return {name: sorted(by_step.values(), key=_step) for name, by_step in sets.items()}


def _step(record: Record) -> int:
    return record["step"]
