"""One self-contained HTML page about a run, or about several side by side.

The page needs no network and no other file: style, script and drawings are inside it, and its content security policy
forbids everything else. It is made from the run folder alone, so it also works while the run is going and after a
crash; the page says what is missing.
"""

from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined, Template

from megatron_dsrl.charts.chart_source import number
from megatron_dsrl.common.disk import write_result
from megatron_dsrl.common.text import shortened, visible
from megatron_dsrl.evaluation.results import results_of_run
from megatron_dsrl.observability.records import read_starts
from megatron_dsrl.observability.run_records import RunRecords, read_run
from megatron_dsrl.provenance import differences, words
from megatron_dsrl.report import run_figures
from megatron_dsrl.report.evaluations import named_by_step, paper_table, pass_at_k_charts, read_analyses, results_table
from megatron_dsrl.report.logs import log_views
from megatron_dsrl.report.run_figures import Table
from megatron_dsrl.report.sampled_responses import MAX_CHARACTERS, shown_steps
from megatron_dsrl.report.training_charts import comparison_charts, other_charts, run_charts


def write_report(run_folder: Path, *others: Path, output: Path | None = None) -> Path:
    """Write the page and return its path.

    One run: `<run folder>/report.html`. Several: a comparison, `<first run folder>/comparison.html`. `output` names
    another file. Raises UserError if a folder is not a run folder, or its files are damaged.
    """
    runs = [read_run(folder) for folder in (run_folder, *others)]
    if len({run.name for run in runs}) < len(runs):
        runs = [replace(run, name=str(run.folder)) for run in runs]
    page = _run_page(runs[0]) if len(runs) == 1 else _comparison_page(runs)
    path = output or run_folder / ("report.html" if len(runs) == 1 else "comparison.html")
    write_result(path, page)
    return path


def _run_page(run: RunRecords) -> str:
    evaluations = named_by_step(results_of_run(run.folder))
    return _template("report.html.j2").render(
        run=run,
        state=run_figures.run_state(run),
        accuracies=[*run_figures.accuracy_figures(run), *run_figures.loss_figures(run)],
        figures=run_figures.run_figures(run),
        sections=run_charts(run) if run.steps else [],
        time=run_figures.time_table(run),
        others=other_charts(run) if run.steps else [],
        results=results_table(evaluations) if evaluations else None,
        paper=paper_table(evaluations),
        pass_at_k=pass_at_k_charts(evaluations),
        analyses=read_analyses(run.folder),
        samples=shown_steps(run.folder, run.step_numbers),
        logs=log_views(run.folder),
        provenance=shown_provenance(run),
    )


def _comparison_page(runs: list[RunRecords]) -> str:
    evaluations = {run.name: results[-1] for run in runs if (results := results_of_run(run.folder))}
    return _template("comparison.html.j2").render(
        table=run_figures.runs_table(runs),
        sections=comparison_charts(runs) if any(run.steps for run in runs) else [],
        results=results_table(evaluations) if evaluations else None,
        paper=paper_table(evaluations),
        pass_at_k=pass_at_k_charts(evaluations),
        provenance=compared_provenance(runs),
    )


def _template(name: str) -> Template:
    environment = Environment(
        loader=ChoiceLoader([PackageLoader(f"megatron_dsrl.{room}") for room in ("report", "charts")]),
        autoescape=True,
        finalize=_without_control_characters,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "shortened": partial(shortened, most=MAX_CHARACTERS)}
    environment.globals["written"] = f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
    return environment.get_template(name)


def _without_control_characters(value: object) -> object:
    """What a template prints: texts of a model must not change how the page looks, or what a copy of it does."""
    return visible(value) if type(value) is str else value  # Markup is made of such texts


@dataclass(frozen=True)
class ShownProvenance:
    """What produced a run: every start, what changed in between, and the last start in full."""

    starts: Table
    changes: Table | None
    """Differences between the starts that produced the run's steps; None if they agree."""
    last: list[tuple[str, str]]
    """Everything that the last start says, by name."""


def shown_provenance(run: RunRecords) -> ShownProvenance | None:
    """None for a run without records of its starts. Raises UserError if the records are damaged."""
    starts = read_starts(run.folder)
    if not starts:
        return None
    rows = []
    for start, span in zip(starts, differences.steps_of_starts(starts, _last_step(run)), strict=True):
        rows.append((
            words.start_time(start),
            f"{span[0]} to {span[1]}" if span else "none",
            words.commit_words(start),
            str(start.get("world_size", "")),
            words.device_words(start.get("device") or {}),
            ", ".join(start.get("hosts") or []),
            words.slurm_words(start.get("slurm")),
        ))  # fmt: skip
    changes = differences.changes_between_starts(differences.starts_that_count(run.folder, _last_step(run)))
    return ShownProvenance(
        starts=Table(("Started", "Steps", "Commit", "Processes", "Device", "Hosts", "SLURM"), tuple(rows)),
        changes=Table(
            ("Changed", "Before", "After", "From step"),
            tuple((one.name, one.before, one.after, str(one.from_step)) for one in changes),
        )
        if changes
        else None,
        last=list({**words.where_it_ran(starts[-1]), **words.what_computed(starts[-1])}.items()),
    )


def compared_provenance(runs: list[RunRecords]) -> list[differences.ComparedFact]:
    """Provenance of several runs; empty if none has a record."""
    starts = [differences.starts_that_count(run.folder, _last_step(run)) for run in runs]
    return differences.compare_runs(starts) if any(starts) else []


def _last_step(run: RunRecords) -> int:
    return run.steps[-1]["step"] if run.steps else 0
