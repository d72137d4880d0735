"""`dsrl rollout`."""

import argparse

from megatron_dsrl.commands.arguments import Commands, add_command, add_config, add_processes
from megatron_dsrl.common.process import launched_world_size
from megatron_dsrl.run.loading import loading_megatron


def add_rollout(commands: Commands) -> None:
    parser = add_command(
        commands,
        "rollout",
        _rollout,
        help="sample the steps of a run, without training",
        description="Sample the steps of a run with its initial weights, without a trainer. A run with "
        "rollout.replay_from can train on the result without engines.",
        epilog="example: dsrl rollout configs/tiny_dsrl.yaml name=sampled steps=2",
    )
    add_config(parser)
    add_processes(parser)


def _rollout(options: argparse.Namespace) -> int:
    from megatron_dsrl.config.load import load_config
    from megatron_dsrl.run.preflight import preflight

    config = load_config(options.config, options.overrides)
    preflight(config, launched_world_size())
    with loading_megatron():
        from megatron_dsrl.run.rollout_only import sample_run

    sample_run(config)
    return 0
