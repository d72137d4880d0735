"""One self-contained HTML page about a run, or about several side by side.

The page needs no network and no other file: style, script and drawings are inside it, and its content security policy
forbids everything else. It is made from the run folder alone, so it also works while the run is going and after a
crash; what is missing is said in words.
"""

import math
import os
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

from megatron_dsrl.evaluation.results_file import results_of_run
from megatron_dsrl.observability.chart_source import number
from megatron_dsrl.observability.console_lines import duration
from megatron_dsrl.observability.records import Record
from megatron_dsrl.observability.run_records import RunRecords, read_run
from megatron_dsrl.report.analyses import read_analyses
from megatron_dsrl.report.evaluations import named_by_step, paper_table, pass_at_k_charts, results_table
from megatron_dsrl.report.logs import log_ends
from megatron_dsrl.report.parts import Figure
from megatron_dsrl.report.provenance import compared_provenance, shown_provenance
from megatron_dsrl.report.sampled_responses import shown_steps
from megatron_dsrl.report.time_table import time_table
from megatron_dsrl.report.training_charts import comparison_charts, other_charts, run_charts


def write_report(run_folder: Path, *others: Path, output: Path | None = None) -> Path:
    """Write the page and return its path.

    One run: `<run folder>/report.html`. Several: a comparison, `<first run folder>/comparison.html`. `output` names
    another file. Raises UserError when a folder is not a run folder or its files are damaged.
    """
    runs = _distinct_names([read_run(folder) for folder in (run_folder, *others)])
    page = _run_page(runs[0]) if len(runs) == 1 else _comparison_page(runs)
    path = output or run_folder / ("report.html" if len(runs) == 1 else "comparison.html")
    temporary = path.with_name(path.name + ".new")
    temporary.write_text(page, encoding="utf-8")
    os.replace(temporary, path)
    return path


def _distinct_names(runs: list[RunRecords]) -> list[RunRecords]:
    """The runs, called by their folders where they share a name."""
    if len({run.name for run in runs}) == len(runs):
        return runs
    return [replace(run, name=str(run.folder)) for run in runs]


def _run_page(run: RunRecords) -> str:
    evaluations = named_by_step(results_of_run(run.folder))
    return _template("report.html.j2").render(
        run=run,
        state=run_state(run),
        accuracies=accuracy_figures(run),
        figures=run_figures(run),
        sections=run_charts(run) if run.steps else [],
        time=time_table(run),
        others=other_charts(run) if run.steps else [],
        results=results_table(evaluations) if evaluations else None,
        paper=paper_table(evaluations),
        pass_at_k=pass_at_k_charts(evaluations),
        analyses=read_analyses(run.folder),
        samples=shown_steps(run.folder, run.step_numbers),
        logs=log_ends(run.folder),
        provenance=shown_provenance(run),
        written=_now(),
    )


def _comparison_page(runs: list[RunRecords]) -> str:
    evaluations = {run.name: results[-1] for run in runs if (results := results_of_run(run.folder))}
    return _template("comparison.html.j2").render(
        rows=[(run, run_state(run), accuracy_figures(run), run_figures(run)) for run in runs],
        sections=comparison_charts(runs) if any(run.steps for run in runs) else [],
        results=results_table(evaluations) if evaluations else None,
        paper=paper_table(evaluations),
        pass_at_k=pass_at_k_charts(evaluations),
        differences=configuration_differences(runs),
        provenance=compared_provenance(runs),
        written=_now(),
    )


def run_state(run: RunRecords) -> str:
    """Whether the run is complete, in words."""
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


def _accuracy_figure(name: str, records: list[Record]) -> Figure:
    first, last = records[0], records[-1]
    problems = f"{last['problems']} problems × {_count(last['samples_per_prompt'], 'sample')}"
    if len(records) == 1:
        when = "before training" if first["step"] == 0 else f"after step {first['step']}"
        return Figure(f"Accuracy on {name}", _accuracy(first), f"{when} only; {problems}")
    before = "before training" if first["step"] == 0 else f"after step {first['step']}"
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
    figures = []
    if run.steps:
        figures += _progress_figures(run)
    if run.config:
        figures += _setting_figures(run.config)
    return figures


def _progress_figures(run: RunRecords) -> list[Figure]:
    planned = f" of {run.total_steps}" if run.total_steps else ""
    seconds = [value for value in run.column("seconds/step") if value is not None]
    tokens = sum(value or 0 for value in run.column("throughput/generated_tokens"))
    failures = sum(value or 0 for key in ("timeouts", "errors") for value in run.column(f"reward/verifier_{key}"))
    rewards = [value for value in run.column("reward/mean") if value is not None]
    figures = [Figure("Steps", f"{run.steps[-1]['step']}{planned}")]
    if rewards:
        figures.append(Figure("Sampled reward", f"{rewards[0]:.3f} → {rewards[-1]:.3f}", "first → last step"))
    if seconds:
        note = f"sum over steps; {number(sum(seconds) / len(seconds))} s per step"
        figures.append(Figure("Wall time", duration(sum(seconds)), note))
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


def configuration_differences(runs: list[RunRecords]) -> list[tuple[str, list[str]]]:
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


def _template(name: str) -> Any:
    environment = Environment(
        loader=ChoiceLoader([PackageLoader(f"megatron_dsrl.{room}") for room in ("report", "observability")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = number
    return environment.get_template(name)


def _count(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")


def _now() -> str:
    return f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
