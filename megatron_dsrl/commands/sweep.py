"""`dsrl sweep`."""

import argparse
from pathlib import Path

from megatron_dsrl.commands.arguments import Commands, add_command, positive


def add_sweep(commands: Commands) -> None:
    """Add the command to `dsrl`\'s."""
    parser = add_command(
        commands,
        "sweep",
        _sweep,
        help="train several configurations with several seeds, and compare them",
        description="Train what a sweep file lists and write the comparison into its folder. Finished runs are kept, "
        "interrupted ones continue: start the same command again after an interruption.",
    )
    parser.add_argument("sweep", metavar="SWEEP.yaml", type=Path, help="sweep file, see `dsrl config --kind sweep`")
    parser.add_argument(
        "--parallel-runs", metavar="N", type=positive, default=1, help="runs at a time (default: 1)"
    )


def _sweep(options: argparse.Namespace) -> int:
    from megatron_dsrl.run.sweep import run_sweep

    return run_sweep(options.sweep, options.parallel_runs)
