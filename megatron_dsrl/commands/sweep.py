"""`dsrl sweep`."""

import argparse
from pathlib import Path

from megatron_dsrl.commands.arguments import Commands, add_command, positive


def add_sweep(commands: Commands) -> None:
    """Register the command."""
    parser = add_command(
        commands,
        "sweep",
        _sweep,
        help="train several configurations with several seeds and compare them",
        description="Train all runs in a sweep file and write the comparison to its output folder. After an "
        "interruption run the same command again: finished runs are kept and interrupted ones resume.",
    )
    parser.add_argument("sweep", metavar="SWEEP.yaml", type=Path, help="sweep file; see `dsrl config --kind sweep`")
    parser.add_argument(
        "--parallel-runs", metavar="N", type=positive, default=1, help="number of runs to train at a time (default: 1)"
    )


def _sweep(options: argparse.Namespace) -> int:
    from megatron_dsrl.run.sweep import run_sweep

    return run_sweep(options.sweep, options.parallel_runs)
