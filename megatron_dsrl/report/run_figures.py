"""Key figures of a run, with their names, the seconds of its parts, and several runs in one table."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from megatron_dsrl.charts.chart_source import number
from megatron_dsrl.common.numbers import counted
from megatron_dsrl.observability.console import duration
from megatron_dsrl.observability.records import Record
from megatron_dsrl.observability.run_records import RunRecords
from megatron_dsrl.report.training_charts import WHOLE_STEP, part_name, step_parts


@dataclass(frozen=True)
class Figure:
    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Table:
    """Rows of text cells; the first cell of a row is its name."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def run_state(run: RunRecords) -> str:
    """Whether the run is complete, in a sentence."""
    if not run.steps:
        return "No training step has been recorded yet."
    done = run.steps[-1]["step"]
    when = f"{run.last_written:%Y-%m-%d %H:%M} UTC"
    if run.total_steps is None:
        return f"{done} steps recorded, the last one on {when}. Without config.yaml the planned length is unknown."
    if done >= run.total_steps:
        return f"Complete: all {run.total_steps} steps, the last one on {when}."
    return (
        f"{done} of {run.total_steps} steps recorded, the last one on {when}:"
        " the run was still going when this page was written, or it was interrupted."
    )


def accuracy_figures(run: RunRecords) -> list[Figure]:
    """Held-out accuracy before and after, one figure per set; empty when nothing was evaluated."""
    return [_accuracy_figure(name, records) for name, records in run.evaluations.items()]


def loss_figures(run: RunRecords) -> list[Figure]:
    """Loss of held-out responses before and after, one figure per set of supervised training."""
    figures = []
    for name, records in run.held_out_losses.items():
        first, last = records[0], records[-1]
        over = f"nats per token; {last['responses']:,} responses"
        if len(records) == 1:
            figures.append(Figure(f"Loss on {name}", _loss(first), f"after step {first['step']} only; {over}"))
        else:
            steps = f"step {first['step']} → {last['step']}"
            figures.append(Figure(f"Loss on {name}", f"{_loss(first)} → {_loss(last)}", f"{steps}; {over}"))
    return figures


def _loss(record: Record) -> str:
    error = record["loss_standard_error"]
    return f"{record['loss']:.3f}" + ("" if error is None else f" ± {error:.3f}")


def _accuracy_figure(name: str, records: list[Record]) -> Figure:
    first, last = records[0], records[-1]
    problems = f"{last['problems']} problems × {counted(last['samples_per_prompt'], 'sample')}"
    before = "before training" if first["step"] == 0 else f"after step {first['step']}"
    if len(records) == 1:
        return Figure(f"Accuracy on {name}", _accuracy(first), f"{before} only; {problems}")
    note = f"{before} → after step {last['step']}{_change(first, last)}; {problems}"
    return Figure(f"Accuracy on {name}", f"{_accuracy(first)} → {_accuracy(last)}", note)


def _accuracy(record: Record) -> str:
    if record["accuracy"] is None:
        return "unknown"
    error = "" if record["standard_error"] is None else f" ± {100 * record['standard_error']:.1f}"
    return f"{100 * record['accuracy']:.1f}{error}\u00a0%"


def _change(first: Record, last: Record) -> str:
    """The difference in points and in standard errors, the two measurements taken as independent."""
    values = (first["accuracy"], last["accuracy"], first["standard_error"], last["standard_error"])
    if None in values:
        return ""
    change = values[1] - values[0]
    error = math.hypot(values[2], values[3])
    return f", {100 * change:+.1f} points" + (f" = {change / error:+.1f} standard errors" if error > 0 else "")


def run_figures(run: RunRecords) -> list[Figure]:
    """Steps, time, tokens, model and layout: what is known of them."""
    return [*(_progress_figures(run) if run.steps else ()), *_setting_figures(run.config)]


def _progress_figures(run: RunRecords) -> list[Figure]:
    planned = f" of {run.total_steps}" if run.total_steps else ""
    seconds, rewards, epochs = (run.known(key) for key in (WHOLE_STEP, "reward/mean", "data/epoch"))
    figures = [Figure("Steps", f"{run.steps[-1]['step']}{planned}")]
    if rewards:
        figures.append(Figure("Sampled reward", f"{rewards[0]:.3f} → {rewards[-1]:.3f}", "first → last step"))
    if seconds:
        note = f"sum over steps; {number(sum(seconds) / len(seconds))} s per step"
        figures.append(Figure("Wall time", duration(sum(seconds)), note))
    if epochs:
        return [*figures, Figure("Epochs", f"{epochs[-1]:.2f}", "passes over the data set")]
    tokens = sum(run.known("throughput/generated_tokens"))
    failures = sum(value for kind in ("timeouts", "errors") for value in run.known(f"reward/verifier_{kind}"))
    figures.append(Figure("Generated", f"{tokens:,} tokens", ""))
    figures.append(Figure("Verifier failures", number(failures), "timeouts and errors, scored 0"))
    return figures


def _setting_figures(config: dict[str, Any]) -> list[Figure]:
    """Figures of the resolved configuration; sections that an unusual file lacks are left out."""
    figures = []
    if rollout := config.get("rollout"):
        batch = f"{rollout.get('prompts_per_step', '?')} × {rollout.get('samples_per_prompt', '?')}"
        figures.append(Figure("Batch", batch, "prompts × responses per step"))
    if model := config.get("model"):
        figures.append(Figure("Model", str(model.get("path", "?")), str(model.get("dtype", ""))))
    if parallel := config.get("parallel"):
        layout = f"TP {parallel.get('tensor_parallel_size', '?')} · PP {parallel.get('pipeline_parallel_size', '?')}"
        figures.append(Figure("Layout", layout, "tensor, pipeline; the rest is data parallel"))
    if engine := config.get("engine"):
        figures.append(Figure("Engine", f"TP {engine.get('tensor_parallel_size', '?')}", "per SGLang server"))
    if "seed" in config:
        figures.append(Figure("Seed", str(config["seed"])))
    return figures


@dataclass(frozen=True)
class RunsTable:
    """One column per run."""

    runs: tuple[str, ...]
    rows: list[tuple[str, str, list[Figure | None]]]
    """Figures in which the runs differ: label, the note that all share, and a cell per run; None if it has none."""
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
        first, notes = cells[0], {cell.note for cell in cells if cell}
        if first is not None and set(cells) == {first}:
            same.append(first)
        elif len(notes) == 1:
            rows.append((label, notes.pop(), [replace(cell, note="") if cell else None for cell in cells]))
        else:
            rows.append((label, "", cells))
    return RunsTable(tuple(run.name for run in runs), rows, configuration_differences(runs), same)


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


def time_table(run: RunRecords) -> Table | None:
    """A row per part, the rest as `other`; None when no step has its time."""
    steps = [record for record in run.steps if record.get(WHOLE_STEP) is not None]
    if not steps:
        return None
    phases = list(dict.fromkeys(record["phase"] for record in steps))
    by_phase = [[record for record in steps if record["phase"] == phase] for phase in phases]
    parts = step_parts(steps)
    header = ("seconds per step", *phases, *(("all steps",) if len(phases) > 1 else ()), "share")
    columns = [*by_phase, *([steps] if len(phases) > 1 else [])]
    whole = sum(record[WHOLE_STEP] for record in steps)
    rows = []
    for part in (*parts, "other", WHOLE_STEP):
        means = (f"{fmean(_seconds(record, part, parts) for record in column):.2f}" for column in columns)
        share = sum(_seconds(record, part, parts) for record in steps) / whole
        name = "the whole step" if part == WHOLE_STEP else part_name(part)
        rows.append((name, *means, f"{100 * share:.0f} %"))
    return Table(header, tuple(rows))


def _seconds(record: Record, part: str, parts: Sequence[str]) -> float:
    """A part that a step did not have took none of its time."""
    if part == "other":
        return max(0.0, record[WHOLE_STEP] - sum(record.get(each) or 0.0 for each in parts))
    return record.get(part) or 0.0
