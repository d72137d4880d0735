"""The run folder at the start of a run: check that it belongs to the run, prepare it, and record the start."""

import shutil
from collections.abc import Callable
from pathlib import Path

from megatron_dsrl.checkpoint.compatibility import check_same_run
from megatron_dsrl.common.collective import on_first, rank
from megatron_dsrl.common.errors import UserError
from megatron_dsrl.common.step_names import by_step
from megatron_dsrl.config.load import dump_config, read_dumped_config
from megatron_dsrl.config.run import RunConfig
from megatron_dsrl.observability import records
from megatron_dsrl.observability.timeline import TRACE_FOLDER
from megatron_dsrl.provenance.differences import changed_inputs
from megatron_dsrl.provenance.inputs import describe_model, describe_prompts, describe_training_sets
from megatron_dsrl.provenance.start import Details, record_start
from megatron_dsrl.rewards.registry import describe_verifiers
from megatron_dsrl.run.inputs import RunInputs


def check_run_folder(config: RunConfig, inputs: RunInputs) -> None:
    """Raise UserError if the folder has a run that was started with a different configuration."""
    file = inputs.run_folder / records.CONFIG_FILE
    # A start that failed before its first step leaves nothing to continue, so it must not prevent another.
    has_checkpoints = (inputs.run_folder / records.CHECKPOINTS_FOLDER).exists()
    has_begun = has_checkpoints or bool(records.read_records(inputs.run_folder / records.METRICS_FILE))
    if file.exists() and has_begun:
        check_same_run(read_dumped_config(file), config, str(inputs.run_folder))


def prepare_run_folder(config: RunConfig, run_folder: Path, step: int) -> None:
    """Rank 0 prepares the folder to continue after `step` (0: from the start) and writes the configuration to it.

    Exports of later steps are deleted, since the steps will be repeated. Records of a run without any checkpoint are
    moved to `<run folder>/interrupted_<number>`. Raises UserError on every rank if the folder cannot be written to.
    """

    def prepare() -> None:
        try:
            run_folder.mkdir(parents=True, exist_ok=True)
            if step == 0:
                _set_aside_records(run_folder)
            for exported_after, export in by_step(run_folder / records.EXPORTS_FOLDER).items():
                if exported_after > step:
                    shutil.rmtree(export)
            dump_config(config, run_folder / records.CONFIG_FILE)
        except OSError as error:
            raise UserError(f"cannot write the run folder {run_folder} (output_dir, name): {error}") from error

    on_first(prepare)


def _set_aside_records(run_folder: Path) -> None:
    names = (
        records.METRICS_FILE,
        records.EVALUATION_FILE,
        records.RESPONSES_FILE,
        "tensorboard",
        "rollouts",
        TRACE_FOLDER,
    )
    if not records.read_records(run_folder / records.METRICS_FILE):
        return
    number = 1 + len(list(run_folder.glob("interrupted_*")))
    target = run_folder / f"interrupted_{number}"
    target.mkdir()
    for name in names:
        if (run_folder / name).exists():
            (run_folder / name).rename(target / name)


def record_run_start(
    command: str, config: RunConfig, inputs: RunInputs, after_step: int, report: Callable[[str], None]
) -> None:
    """Record a start of `dsrl train` or `dsrl rollout` in the run folder, and report how verifiers run. Collective.

    Args:
        command: `train` or `rollout`.
        after_step: the checkpoint's step that the run continues after; 0 from the beginning.
        report: called on rank 0 with a line on a verifier that depends on the machine, and with a warning if there can
            be no record, or if the run continues with a different model or different data under the same path.
    """
    held_out = (evaluation_set.reward for evaluation_set in config.evaluation.sets)
    rewards = [config.reward, *(one.config for one in config.data.set_rewards.values()), *held_out]
    verifiers = describe_verifiers(rewards) if rank() == 0 else []
    for line in verifiers:
        report(line)
    details: Details = {
        "after_step": lambda: after_step,
        "layout": lambda: config.parallel.model_dump(mode="json"),
        "engine_tensor_parallel_size": lambda: config.engine.tensor_parallel_size,
        "model": lambda: describe_model(config.model.path, inputs.model_folder),
        "data": lambda: describe_training_sets(config.data, inputs.prompts),
        "evaluation_sets": lambda: {
            one.name: describe_prompts(one, prompts) for one, prompts in inputs.evaluation_sets
        },
        "verifiers": lambda: verifiers,
    }
    record_start(inputs.run_folder, command, details, report)
    if after_step > 0 and rank() == 0:
        for change in changed_inputs(inputs.run_folder, after_step):
            report(
                f"warning: the steps up to {after_step} had another input; {change.name}: {change.before} then, "
                f"{change.after} now"
            )
