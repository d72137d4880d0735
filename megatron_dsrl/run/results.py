"""Results in a run's folder, and whether the run is complete. Light: a finished run is recognised before Megatron
and Transformers are loaded."""

from pathlib import Path

from megatron_dsrl.checkpoint.compatibility import check_same_run
from megatron_dsrl.config.run import EvaluationConfig, RunConfig
from megatron_dsrl.config.yaml_text import parse_yaml
from megatron_dsrl.observability.records import (
    CHECKPOINTS_FOLDER,
    CONFIG_FILE,
    EVALUATION_FILE,
    EXPORTS_FOLDER,
    METRICS_FILE,
    read_records,
)


def exported_policy(run_folder: Path, step: int) -> Path:
    """Folder of the exported policy after a step."""
    return run_folder / EXPORTS_FOLDER / f"step_{step:06d}"


def has_results(run_folder: Path, evaluation: EvaluationConfig, step: int) -> bool:
    """Whether the export and all evaluations after this step exist."""
    evaluated = {record["set"] for record in read_records(run_folder / EVALUATION_FILE) if record["step"] == step}
    return exported_policy(run_folder, step).exists() and all(s.name in evaluated for s in evaluation.sets)


def finished_step(config: RunConfig) -> int | None:
    """The last step of a complete run: recorded, saved, exported and evaluated. None if something is missing.

    Raises:
        UserError: the folder has a complete run with another configuration.
    """
    run_folder = Path(config.output_dir) / config.name
    file = run_folder / CONFIG_FILE
    step = max((record["step"] for record in read_records(run_folder / METRICS_FILE)), default=0)
    is_saved = (run_folder / CHECKPOINTS_FOLDER / f"step_{step:06d}").exists()
    if step < config.steps or not file.exists() or not is_saved or not has_results(run_folder, config.evaluation, step):
        return None
    before, _ = parse_yaml(file.read_text(encoding="utf-8"), str(file))
    check_same_run(before, config, str(run_folder))
    return step
