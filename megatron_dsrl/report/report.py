"""One self-contained HTML page about a run, or about several side by side.

The page needs no network and no other file: style, script and drawings are inside it, and its content security policy
forbids everything else. It is made from the run folder alone, so it also works while the run is going and after a
crash; what is missing is said in words.
"""

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined, Template

from megatron_dsrl.charts.chart_source import number
from megatron_dsrl.common.disk import write_result
from megatron_dsrl.common.visible_text import visible
from megatron_dsrl.evaluation.results import results_of_run
from megatron_dsrl.observability.run_records import RunRecords, read_run
from megatron_dsrl.report.analyses import read_analyses
from megatron_dsrl.report.evaluations import named_by_step, paper_table, pass_at_k_charts, results_table
from megatron_dsrl.report.logs import log_views
from megatron_dsrl.report.provenance import compared_provenance, shown_provenance
from megatron_dsrl.report.run_figures import accuracy_figures, loss_figures, run_figures, run_state
from megatron_dsrl.report.runs_table import runs_table
from megatron_dsrl.report.sampled_responses import shown_steps
from megatron_dsrl.report.training_charts import comparison_charts, other_charts, run_charts, time_table


def write_report(run_folder: Path, *others: Path, output: Path | None = None) -> Path:
    """Write the page and return its path.

    One run: `<run folder>/report.html`. Several: a comparison, `<first run folder>/comparison.html`. `output` names
    another file. Raises UserError when a folder is not a run folder or its files are damaged.
    """
    runs = _distinct_names([read_run(folder) for folder in (run_folder, *others)])
    page = _run_page(runs[0]) if len(runs) == 1 else _comparison_page(runs)
    path = output or run_folder / ("report.html" if len(runs) == 1 else "comparison.html")
    write_result(path, page)
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
        accuracies=[*accuracy_figures(run), *loss_figures(run)],
        figures=run_figures(run),
        sections=run_charts(run) if run.steps else [],
        time=time_table(run),
        others=other_charts(run) if run.steps else [],
        results=results_table(evaluations) if evaluations else None,
        paper=paper_table(evaluations),
        pass_at_k=pass_at_k_charts(evaluations),
        analyses=read_analyses(run.folder),
        samples=shown_steps(run.folder, run.step_numbers),
        logs=log_views(run.folder),
        provenance=shown_provenance(run),
        written=_now(),
    )


def _comparison_page(runs: list[RunRecords]) -> str:
    evaluations = {run.name: results[-1] for run in runs if (results := results_of_run(run.folder))}
    return _template("comparison.html.j2").render(
        table=runs_table(runs),
        sections=comparison_charts(runs) if any(run.steps for run in runs) else [],
        results=results_table(evaluations) if evaluations else None,
        paper=paper_table(evaluations),
        pass_at_k=pass_at_k_charts(evaluations),
        provenance=compared_provenance(runs),
        written=_now(),
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
    environment.filters["number"] = number
    return environment.get_template(name)


def _without_control_characters(value: object) -> object:
    """What a template prints: texts of a model must not change how the page looks, or what a copy of it does."""
    return visible(value) if type(value) is str else value  # Markup is made of such texts


def _now() -> str:
    return f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
