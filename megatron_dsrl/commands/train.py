"""`dsrl train`, `sft` and `sweep`. Megatron is only imported when a run starts."""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_dsrl.commands.arguments import Command, Commands, add_command, positive, positive_number, read_config
from megatron_dsrl.common.errors import UserError
from megatron_dsrl.common.process import launched_rank, launched_world_size
from megatron_dsrl.common.waiting import say_on_first_rank
from megatron_dsrl.run.loading import loading_megatron

if TYPE_CHECKING:
    from megatron_dsrl.config.run import RunConfig

FROM_DATA_SET = ("rollout.source=dataset", "rollout.samples_per_prompt=1")


def add_train(commands: Commands) -> None:
    parser = add_command(
        commands,
        "train",
        run_training,
        "train a model as configured in a YAML file",
        description="Train a model as configured in a YAML file. The same command resumes an interrupted run.",
        epilog="example: dsrl train configs/tiny_dsrl.yaml rollout.temperature=0.7 phases.0.until_step=5 --dry-run",
    )
    _add_run(parser)


def _add_run(parser: Command) -> None:
    parser.add_config()
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check everything that can be checked beforehand, and print the resolved configuration, batch sizes, "
        "layout and phases, without starting anything",
    )
    parser.add_processes(" (with --dry-run: check for N processes)")
    parser.add_argument("-v", "--verbose", action="store_true", help="print all metrics of every step")


def run_training(options: argparse.Namespace) -> int:
    """Run or continue a training, or check it only (`--dry-run`). Returns the exit status. Raises UserError if
    something does not fit; see `preflight` and `train`."""
    if options.verbose:
        options.overrides = [*options.overrides, "observability.verbose=true"]
    config = read_config(options)
    world_size = options.processes or launched_world_size()
    if not options.dry_run and _is_complete(config):
        return 0
    from megatron_dsrl.config.summary import batch_lines, print_dry_run, sampling_warnings
    from megatron_dsrl.observability.trackers.base import check_packages
    from megatron_dsrl.run.preflight import check_weight_files, preflight

    figures = preflight(config, world_size)
    check_packages(config.observability.trackers)
    if options.dry_run:
        from rich.console import Console

        check_weight_files(config)
        if launched_rank() == 0:
            print_dry_run(config, figures, Console())
        return 0
    run_folder = Path(config.output_dir) / config.name
    for line in (f"run folder: {run_folder}", *batch_lines(config, figures), *sampling_warnings(config.rollout)):
        say_on_first_rank(line)
    _train(config, world_size)
    return 0


def _train(config: "RunConfig", world_size: int) -> None:
    from megatron_dsrl.rollout.engines.server_process import starting_server

    with starting_server(config) as starting:  # imports SGLang while this process imports Megatron
        with loading_megatron():
            from megatron_dsrl.planning.memory_warnings import memory_warnings, this_machine
            from megatron_dsrl.platform.engine import allocator_warning
            from megatron_dsrl.train import train

        if launched_rank() == 0:
            allocator = None if config.engine.urls else allocator_warning()
            for warning in [*memory_warnings(config, world_size, this_machine()), *filter(None, [allocator])]:
                say_on_first_rank(warning)
        try:
            train(config, starting)
        except UserError as error:
            # Only this rank may have hit the error, so it must not be lost.
            if launched_rank() != 0:
                print(f"dsrl: rank {launched_rank()}: {error}", file=sys.stderr, flush=True)
            raise


def _is_complete(config: "RunConfig") -> bool:
    """Whether the run is already complete; rank 0 then says so. Not collective: every rank reads the run folder."""
    from megatron_dsrl.run.results import closing_lines, finished_step

    step = finished_step(config)
    if step is not None and launched_rank() == 0:
        print(*closing_lines(Path(config.output_dir) / config.name, step), sep="\n")
    return step is not None


def add_sft(commands: Commands) -> None:
    parser = add_command(
        commands,
        "sft",
        _sft,
        "fine-tune a model on the responses of a data set",
        epilog="example: dsrl sft examples/sft/run.yaml --epochs 2",
    )
    _add_run(parser)
    parser.add_argument(
        "--epochs",
        metavar="N",
        type=positive_number,
        help="passes over the rows of a local data.source; sets `steps`, rounded up",
    )


def _sft(options: argparse.Namespace) -> int:
    """Supervised fine-tuning: train on prompt/response pairs (data.response_field) instead of samples. No engine is
    started. The same command resumes an interrupted run."""
    options.overrides = [*FROM_DATA_SET, *options.overrides]
    if options.epochs is not None:
        options.overrides.append(f"steps={steps_of_epochs(options.config, options.overrides, options.epochs)}")
    return run_training(options)


def steps_of_epochs(files: Sequence[str], overrides: Sequence[str], epochs: float) -> int:
    """Number of steps for this many passes over the training set, rounded up. Raises UserError if the rows cannot be
    counted before the run."""
    from megatron_dsrl.config.load import load_config
    from megatron_dsrl.run.preflight import count_training_prompts

    config = load_config(files, [*overrides, "steps=1"])
    rows = count_training_prompts(config.data, config.made_by)
    if rows is None:
        source = config.data.source
        raise UserError(f"--epochs: the rows of data.source={source} are not counted before the run; set steps instead")
    return math.ceil(epochs * rows / config.rollout.prompts_per_step)


def add_sweep(commands: Commands) -> None:
    parser = add_command(commands, "sweep", _sweep, "train several configurations with several seeds and compare them")
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
    """`2/8` -> (2, 8)."""
    first, slash, count = text.partition("/")
    if not (slash and first.isdecimal() and count.isdecimal() and 1 <= int(first) <= int(count)):
        raise argparse.ArgumentTypeError(f"expected K/N with K from 1 to N, such as 2/8, got {text}")
    return int(first), int(count)


def _sweep(options: argparse.Namespace) -> int:
    """Train all runs in a sweep file and write the comparison to its output folder. After an interruption run the same
    command again: finished runs are kept and interrupted ones resume."""
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
