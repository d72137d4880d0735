"""Results in a run's folder: whether the run is complete, and the lines to print then. Light: a finished run is
recognised before Megatron and Transformers are loaded."""

import shlex
from collections.abc import Iterator
from pathlib import Path

from megatron_dsrl.checkpoint.compatibility import check_same_run
from megatron_dsrl.config.load import read_dumped_config
from megatron_dsrl.config.run import EvaluationConfig, RunConfig
from megatron_dsrl.observability import records
from megatron_dsrl.observability.records import Record


def exported_policy(run_folder: Path, step: int) -> Path:
    """Folder of the exported policy after a step."""
    return run_folder / records.EXPORTS_FOLDER / f"step_{step:06d}"


def has_results(run_folder: Path, evaluation: EvaluationConfig, step: int) -> bool:
    """Whether the export and all evaluations after this step exist."""
    evaluated = {
        record["set"] for record in records.read_records(run_folder / records.EVALUATION_FILE) if record["step"] == step
    }
    return exported_policy(run_folder, step).exists() and all(s.name in evaluated for s in evaluation.sets)


def finished_step(config: RunConfig) -> int | None:
    """The last step of a complete run: recorded, saved, exported and evaluated. None if something is missing.

    Raises UserError if the folder has a complete run with a different configuration.
    """
    run_folder = Path(config.output_dir) / config.name
    file = run_folder / records.CONFIG_FILE
    step = max((record["step"] for record in records.read_records(run_folder / records.METRICS_FILE)), default=0)
    is_saved = (run_folder / records.CHECKPOINTS_FOLDER / f"step_{step:06d}").exists()
    if step < config.steps or not file.exists() or not is_saved or not has_results(run_folder, config.evaluation, step):
        return None
    check_same_run(read_dumped_config(file), config, str(run_folder))
    return step


def closing_lines(run_folder: Path, steps: int) -> list[str]:
    """Closing lines for a run whose last step is `steps`, with the accuracies or losses in its evaluation.jsonl."""
    evaluations = records.read_records(run_folder / records.EVALUATION_FILE)
    argument = shlex.quote(str(run_folder))
    after_report = f"      dsrl samples {argument}   responses to read"
    if any("loss" in record for record in evaluations):  # nothing was sampled
        after_report = f"      dsrl eval {argument}      accuracy on benchmarks"
    return [
        f"{run_folder} is complete: {steps} steps",
        *_results(evaluations, "accuracy", "{:.1%}"),
        *_results(evaluations, "loss", "loss {:.4f}"),
        f"next: dsrl report {argument}    one HTML page: curves, seconds, samples",
        after_report,
    ]


def _results(evaluations: list[Record], key: str, words: str) -> Iterator[str]:
    """A line per held-out set, from its first evaluation to its last."""
    for name in dict.fromkeys(record["set"] for record in evaluations):
        known = [record for record in evaluations if record["set"] == name and record.get(key) is not None]
        if not known:
            continue
        first, last = known[0], known[-1]
        if first["step"] == last["step"]:
            yield f"{name}: {words.format(last[key])} after step {last['step']}"
        else:
            before, after = (f"{words.format(record[key])} (step {record['step']})" for record in (first, last))
            yield f"{name}: {before} -> {after}"
