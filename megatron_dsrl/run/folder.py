"""The run folder: check that it belongs to this run, and prepare it at the start."""

import shutil
from pathlib import Path

from megatron_dsrl.checkpoint.compatibility import check_same_run
from megatron_dsrl.common.collective import on_first
from megatron_dsrl.common.errors import UserError
from megatron_dsrl.common.step_names import by_step
from megatron_dsrl.config.load import dump_config, read_dumped_config
from megatron_dsrl.config.run import RunConfig
from megatron_dsrl.observability.records import (
    CHECKPOINTS_FOLDER,
    CONFIG_FILE,
    EVALUATION_FILE,
    EXPORTS_FOLDER,
    METRICS_FILE,
    RESPONSES_FILE,
    read_records,
)
from megatron_dsrl.observability.timeline import TRACE_FOLDER
from megatron_dsrl.run.inputs import RunInputs


def check_run_folder(config: RunConfig, inputs: RunInputs) -> None:
    """Refuse to continue another run.

    Raises:
        UserError: the folder has a run that was started with another configuration.
    """
    file = inputs.run_folder / CONFIG_FILE
    # A start that failed before its first step leaves nothing to continue, so it must not prevent another.
    has_checkpoints = (inputs.run_folder / CHECKPOINTS_FOLDER).exists()
    has_begun = has_checkpoints or bool(read_records(inputs.run_folder / METRICS_FILE))
    if file.exists() and has_begun:
        check_same_run(read_dumped_config(file), config, str(inputs.run_folder))


def prepare_run_folder(config: RunConfig, run_folder: Path, step: int) -> None:
    """Rank 0 prepares the folder to continue after `step` (0: from the start) and writes the configuration to it.

    Exports of later steps are deleted, since the steps will be repeated. Records of a run without any checkpoint are
    moved to `<run folder>/interrupted_<number>`.

    Raises:
        UserError: on every rank, if the folder cannot be written to.
    """

    def prepare() -> None:
        try:
            run_folder.mkdir(parents=True, exist_ok=True)
            if step == 0:
                _set_aside_records(run_folder)
            _remove_later_exports(run_folder, step)
            dump_config(config, run_folder / CONFIG_FILE)
        except OSError as error:
            raise UserError(f"cannot write the run folder {run_folder} (output_dir, name): {error}") from error

    on_first(prepare)


def _remove_later_exports(run_folder: Path, step: int) -> None:
    for exported_after, export in by_step(run_folder / EXPORTS_FOLDER).items():
        if exported_after > step:
            shutil.rmtree(export)


def _set_aside_records(run_folder: Path) -> None:
    names = (METRICS_FILE, EVALUATION_FILE, RESPONSES_FILE, "tensorboard", "rollouts", TRACE_FOLDER)
    if not read_records(run_folder / METRICS_FILE):
        return
    number = 1 + len(list(run_folder.glob("interrupted_*")))
    target = run_folder / f"interrupted_{number}"
    target.mkdir()
    for name in names:
        if (run_folder / name).exists():
            (run_folder / name).rename(target / name)
