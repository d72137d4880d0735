"""`dsrl train`, and what `dsrl sft` has in common with it. Megatron is only imported when a run starts."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_dsrl.commands.arguments import Commands, add_command, add_config, add_processes
from megatron_dsrl.common.errors import UserError
from megatron_dsrl.common.process import launched_rank, launched_world_size
from megatron_dsrl.common.waiting import say_on_first_rank
from megatron_dsrl.run.loading import loading_megatron

if TYPE_CHECKING:
    from megatron_dsrl.config.run import RunConfig


def add_train(commands: Commands) -> None:
    parser = add_command(
        commands,
        "train",
        _train,
        help="train a model as configured in a YAML file",
        description="Train a model as configured in a YAML file. The same command resumes an interrupted run.",
        epilog="example: dsrl train configs/tiny_dsrl.yaml rollout.temperature=0.7 phases.0.until_step=5 --dry-run",
    )
    add_run(parser)


def add_run(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of a command that trains."""
    add_config(parser)
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check everything that can be checked beforehand, and print the resolved configuration, batch sizes, "
        "layout and phases, without starting anything",
    )
    add_processes(parser, " (with --dry-run: check for N processes)")
    parser.add_argument("-v", "--verbose", action="store_true", help="print all metrics of every step")


def _train(options: argparse.Namespace) -> int:
    from megatron_dsrl.config.load import load_config

    return run_training(load_config(options.config, overrides_of(options)), options)


def overrides_of(options: argparse.Namespace) -> list[str]:
    """The configuration overrides among the arguments of `add_run`."""
    return [*options.overrides, *(["observability.verbose=true"] if options.verbose else [])]


def run_training(config: "RunConfig", options: argparse.Namespace) -> int:
    """Run or continue a training, or check it only (`--dry-run`). Returns the exit status.

    Args:
        options: of `add_run`.

    Raises:
        UserError: something does not fit; see `preflight` and `train`.
    """
    world_size = options.processes or launched_world_size()
    if not options.dry_run and _is_complete(config):
        return 0
    from megatron_dsrl.run.preflight import preflight

    figures = preflight(config, world_size)
    from megatron_dsrl.observability.trackers.base import check_packages

    check_packages(config.observability.trackers)
    from megatron_dsrl.config.summary import batch_lines, print_dry_run, sampling_warnings

    if options.dry_run:
        from rich.console import Console

        from megatron_dsrl.run.preflight import check_weight_files

        check_weight_files(config)
        if launched_rank() == 0:
            print_dry_run(config, figures, Console())
        return 0
    run_folder = Path(config.output_dir) / config.name
    for line in (f"run folder: {run_folder}", *batch_lines(config, figures), *sampling_warnings(config.rollout)):
        say_on_first_rank(line)
    from megatron_dsrl.rollout.engines.starting_server import starting_server

    with starting_server(config) as starting:  # imports SGLang while this process imports Megatron
        with loading_megatron():
            from megatron_dsrl.planning.warnings import memory_warnings, this_machine
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
    return 0


def _is_complete(config: "RunConfig") -> bool:
    """Whether the run is already complete; rank 0 then says so. Not collective: every rank reads the run folder."""
    from megatron_dsrl.run.results import finished_step

    step = finished_step(config)
    if step is None:
        return False
    from megatron_dsrl.run.results import closing_lines

    if launched_rank() == 0:
        print(*closing_lines(Path(config.output_dir) / config.name, step), sep="\n")
    return True
