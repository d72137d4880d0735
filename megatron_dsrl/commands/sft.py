"""`dsrl sft`: `dsrl train` on the responses of a data set."""

import argparse
import math
from collections.abc import Sequence

from megatron_dsrl.commands.arguments import Commands, add_command, positive_number
from megatron_dsrl.commands.train import add_run, overrides_of, run_training
from megatron_dsrl.common.errors import UserError

FROM_DATA_SET = ("rollout.source=dataset", "rollout.samples_per_prompt=1")


def add_sft(commands: Commands) -> None:
    parser = add_command(
        commands,
        "sft",
        _sft,
        help="fine-tune a model on the responses of a data set",
        description="Supervised fine-tuning: train on prompt/response pairs (data.response_field) instead of samples. "
        "No engine is started. The same command resumes an interrupted run.",
        epilog="example: dsrl sft examples/sft/run.yaml --epochs 2",
    )
    add_run(parser)
    parser.add_argument(
        "--epochs",
        metavar="N",
        type=positive_number,
        help="passes over the rows of a local data.source; sets `steps`, rounded up",
    )


def _sft(options: argparse.Namespace) -> int:
    from megatron_dsrl.config.load import load_config

    overrides = [*FROM_DATA_SET, *overrides_of(options)]
    if options.epochs is not None:
        overrides.append(f"steps={steps_of_epochs(options.config, overrides, options.epochs)}")
    return run_training(load_config(options.config, overrides), options)


def steps_of_epochs(files: Sequence[str], overrides: Sequence[str], epochs: float) -> int:
    """Steps of `rollout.prompts_per_step` rows that pass over the training set this often, rounded up.

    Raises:
        UserError: the rows cannot be counted before the run.
    """
    from megatron_dsrl.config.load import load_config
    from megatron_dsrl.run.preflight import count_training_prompts

    config = load_config(files, [*overrides, "steps=1"])
    rows = count_training_prompts(config.data, config.made_by)
    if rows is None:
        source = config.data.source
        raise UserError(f"--epochs: the rows of data.source={source} are not counted before the run; set steps instead")
    return math.ceil(epochs * rows / config.rollout.prompts_per_step)
