"""`dsrl sweep`."""

import argparse
import sys
from pathlib import Path

from megatron_dsrl.commands.arguments import Commands, add_command, positive


def add_sweep(commands: Commands) -> None:
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

    parser.add_argument(
        "--part",
        metavar="K/N",
        type=_part,
        default=(1, 1),
        help="train only the runs K, K + N, K + 2 N, ... of the list: for N machines, or the tasks of a SLURM array, "
        "that share the output folder (default: 1/1, all)",
    )


def _part(text: str) -> tuple[int, int]:
    """`2/8` -> (2, 8).

    Raises:
        ArgumentTypeError: not of this form, or K is not in 1..N.
    """
    first, slash, count = text.partition("/")
    if not (slash and first.isdecimal() and count.isdecimal() and 1 <= int(first) <= int(count)):
        raise argparse.ArgumentTypeError(f"expected K/N with K from 1 to N, such as 2/8, got {text}")
    return int(first), int(count)


def _sweep(options: argparse.Namespace) -> int:
    from megatron_dsrl.report.comparison import FIGURE_FILE, TABLE_FILE, write_comparison
    from megatron_dsrl.run.sweep import load_sweep, run_sweep, runs_of, with_results

    sweep = load_sweep(options.sweep)
    runs = runs_of(sweep, options.sweep.parent)
    first, count = options.part
    failed = run_sweep(runs[first - 1 :: count], options.parallel_runs)
    by_method, folder = with_results(runs), Path(sweep.output_dir)
    for run in failed:
        print(f"failed: {run.method}, seed {run.seed}: see {run.log}", file=sys.stderr)
    if sweep.baseline in by_method:
        print(write_comparison(by_method, sweep.baseline, folder))
        print(f"written to {folder / TABLE_FILE} and {folder / FIGURE_FILE}")
    return 1 if failed else 0
