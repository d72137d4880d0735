"""Several runs in one table: their results, and where their configurations differ."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from megatron_dsrl.observability.run_records import RunRecords
from megatron_dsrl.report.parts import Figure
from megatron_dsrl.report.run_figures import accuracy_figures, loss_figures, run_figures, run_state


@dataclass(frozen=True)
class RunsTable:
    """One column per run."""

    runs: tuple[str, ...]
    rows: list[tuple[str, str, list[Figure | None]]]
    """Figures in which the runs differ: label, the note that all share, and a cell per run; None where it has none."""
    differences: list[tuple[str, list[str]]]
    """Configuration fields in which the runs differ: dotted path, and each run's value."""
    same: list[Figure]
    """Figures that are equal in all runs."""


def runs_table(runs: Sequence[RunRecords]) -> RunsTable:
    """The table of runs that have different names."""
    columns = [_figures(run) for run in runs]
    rows: list[tuple[str, str, list[Figure | None]]] = []
    same: list[Figure] = []
    for label in dict.fromkeys(label for column in columns for label in column):
        cells = [column.get(label) for column in columns]
        first = cells[0]
        if first is not None and set(cells) == {first}:
            same.append(first)
        else:
            rows.append(_row(label, cells))
    return RunsTable(tuple(run.name for run in runs), rows, configuration_differences(runs), same)


def _row(label: str, cells: list[Figure | None]) -> tuple[str, str, list[Figure | None]]:
    notes = {cell.note for cell in cells if cell}
    if len(notes) > 1:
        return label, "", cells
    return label, notes.pop(), [replace(cell, note="") if cell else None for cell in cells]


def _figures(run: RunRecords) -> dict[str, Figure]:
    figures = [*accuracy_figures(run), *loss_figures(run), Figure("State", run_state(run)), *run_figures(run)]
    return {figure.label: figure for figure in figures}


def configuration_differences(runs: Sequence[RunRecords]) -> list[tuple[str, list[str]]]:
    """Configuration fields in which the runs differ: dotted path, and each run's value in order."""
    flat = [_flattened(run.config) for run in runs]
    paths = sorted(set().union(*flat) - {"name"})
    rows = [(path, [str(values.get(path, "absent")) for values in flat]) for path in paths]
    return [(path, values) for path, values in rows if len(set(values)) > 1]


def _flattened(value: Any, path: str = "") -> dict[str, Any]:
    if isinstance(value, dict) and value:
        items = [(f"{path}.{key}" if path else str(key), child) for key, child in value.items()]
    elif isinstance(value, list) and value:
        items = [(f"{path}[{index}]", child) for index, child in enumerate(value)]
    else:
        return {path: value} if path else {}
    return {leaf: content for child_path, child in items for leaf, content in _flattened(child, child_path).items()}
