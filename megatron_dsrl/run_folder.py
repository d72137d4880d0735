"""The run folder: does it belong to this run, and what is written into it at the start."""

import torch.distributed as dist
import yaml

from megatron_dsrl.checkpoint.compatibility import check_same_run
from megatron_dsrl.config.load import dump_config
from megatron_dsrl.config.run import RunConfig
from megatron_dsrl.errors import UserError
from megatron_dsrl.run_inputs import RunInputs

CONFIG_FILE = "config.yaml"


def check_run_folder(config: RunConfig, inputs: RunInputs) -> None:
    """Refuse to continue another run.

    Raises:
        UserError: the folder holds a run that was started with another configuration.
    """
    file = inputs.run_folder / CONFIG_FILE
    if file.exists():
        check_same_run(yaml.safe_load(file.read_text(encoding="utf-8")), config, str(inputs.run_folder))


def write_run_folder(config: RunConfig, inputs: RunInputs) -> None:
    """Rank 0 makes the folder and keeps the resolved configuration in it.

    Raises:
        UserError: on every rank, when the folder cannot be written to.
    """
    problem: str | None = None
    if dist.get_rank() == 0:
        try:
            inputs.run_folder.mkdir(parents=True, exist_ok=True)
            dump_config(config, inputs.run_folder / CONFIG_FILE)
        except OSError as error:
            problem = f"cannot write the run folder {inputs.run_folder} (output_dir, name): {error}"
    problems = [problem]
    dist.broadcast_object_list(problems, src=0)
    if problems[0] is not None:
        raise UserError(problems[0])
