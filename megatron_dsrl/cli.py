"""The `dsrl` command.

A mistake that a user can fix ends in one message on stderr and status 2; Ctrl-C in status 130, SIGTERM in 143; a
defect keeps its traceback and ends in status 1. Each command imports what it needs when it runs, so that `--help`,
`--dry-run` and `doctor` stay light.
"""

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from megatron_dsrl import __version__
from megatron_dsrl.commands.analyse import add_analyse
from megatron_dsrl.commands.arguments import (
    Commands,
    add_command,
    add_config,
    add_processes,
    positive,
    subcommands,
)
from megatron_dsrl.commands.config import add_config_command
from megatron_dsrl.commands.convert import add_convert
from megatron_dsrl.commands.eval_and_table import add_eval, add_rescore, add_table
from megatron_dsrl.commands.plan import add_plan
from megatron_dsrl.commands.push import add_push
from megatron_dsrl.commands.samples import add_samples
from megatron_dsrl.commands.trace_and_compare import add_compare, add_trace, add_upload
from megatron_dsrl.common.errors import UserError
from megatron_dsrl.common.process import end_with_launcher
from megatron_dsrl.observability.waiting import say_on_first_rank
from megatron_dsrl.run.loading import loading_megatron

if TYPE_CHECKING:
    from megatron_dsrl.config.run import RunConfig

USER_ERROR_STATUS = 2
INTERRUPTED_STATUS = 130
TERMINATED_STATUS = 143


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    end_with_launcher()
    # Modules in the current folder are found by their dotted paths, as with `python -m`.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    arguments = sys.argv[1:] if arguments is None else arguments
    options = _parse(arguments)
    previous_handler = signal.signal(signal.SIGTERM, _exit_on_sigterm)
    try:
        return _run(options, arguments)
    except UserError as error:
        _print_error(str(error))
        return USER_ERROR_STATUS
    except KeyboardInterrupt:
        _print_error("interrupted")
        return INTERRUPTED_STATUS
    finally:
        signal.signal(signal.SIGTERM, previous_handler)


def _run(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    """Here, or with `--processes` in as many processes of the same command. A dry run has only one."""
    if getattr(options, "processes", None) is not None and not getattr(options, "dry_run", False):
        from megatron_dsrl.commands.launch import launch, others_started

        if not others_started(options.processes):
            return launch([sys.executable, "-m", "megatron_dsrl.cli", *arguments], options.processes)
    return options.command(options)


def _exit_on_sigterm(signal_number: int, frame: FrameType | None) -> None:
    # SLURM and torchrun end a job this way. As an exception it unwinds the stack, so that engines are shut down.
    raise SystemExit(TERMINATED_STATUS)


def _print_error(message: str) -> None:
    """Under torchrun every rank meets a wrong configuration, but only rank 0 says so; `_train` names other ranks."""
    if _rank() == 0:
        print(f"dsrl: {message}", file=sys.stderr, flush=True)


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _train(options: argparse.Namespace) -> int:
    from megatron_dsrl.config.load import load_config
    from megatron_dsrl.run.preflight import preflight

    world_size = options.processes or int(os.environ.get("WORLD_SIZE", "1"))
    verbose = ["observability.verbose=true"] if options.verbose else []
    config = load_config(options.config, [*options.overrides, *verbose])
    if not options.dry_run and _is_complete(config):
        return 0
    figures = preflight(config, world_size)
    from megatron_dsrl.observability.trackers.base import check_packages

    check_packages(config.observability.trackers)
    from megatron_dsrl.config.summary import batch_lines, print_dry_run

    if options.dry_run:
        from rich.console import Console

        if _rank() == 0:
            print_dry_run(config, figures, Console())
        return 0
    for line in (f"run folder: {Path(config.output_dir) / config.name}", *batch_lines(config, figures)):
        say_on_first_rank(line)
    with loading_megatron():
        from megatron_dsrl.planning.warnings import memory_warnings, this_machine
        from megatron_dsrl.train import train

    if _rank() == 0:
        for warning in memory_warnings(config, world_size, this_machine()):
            say_on_first_rank(warning)
    try:
        train(config)
    except UserError as error:
        # Only this rank may have met it, so it must not be lost.
        if _rank() != 0:
            print(f"dsrl: rank {_rank()}: {error}", file=sys.stderr, flush=True)
        raise
    return 0


def _is_complete(config: "RunConfig") -> bool:
    """Whether there is nothing left to do, which rank 0 then says. Every rank finds out by itself."""
    from megatron_dsrl.run.results import finished_step

    step = finished_step(config)
    if step is None:
        return False
    from megatron_dsrl.run.closing import closing_lines

    if _rank() == 0:
        print(*closing_lines(Path(config.output_dir) / config.name, step), sep="\n")
    return True


def _fetch(options: argparse.Namespace) -> int:
    from megatron_dsrl.config.load import load_config
    with loading_megatron(sys.stderr):
        from megatron_dsrl.commands.fetch import fetch

    print(fetch(load_config(options.config, options.overrides), options.benchmarks))
    return 0


def _rollout(options: argparse.Namespace) -> int:
    from megatron_dsrl.config.load import load_config
    from megatron_dsrl.run.preflight import preflight

    config = load_config(options.config, options.overrides)
    preflight(config, int(os.environ.get("WORLD_SIZE", "1")))
    with loading_megatron():
        from megatron_dsrl.commands.rollout import sample_run

    sample_run(config)
    return 0


def _report(options: argparse.Namespace) -> int:
    from megatron_dsrl.report.learning_curve import write_learning_curve
    from megatron_dsrl.report.report import write_report

    if options.figure is None:
        print(write_report(*options.runs, output=options.output))
    elif len(options.runs) == 1 and options.output is None:
        print(write_learning_curve(options.runs[0], options.figure))
    else:
        raise UserError("--figure draws one run: give one RUN and no --output. `dsrl compare` draws several runs")
    return 0


def _sweep(options: argparse.Namespace) -> int:
    from megatron_dsrl.commands.sweep import run_sweep

    return run_sweep(options.sweep, options.parallel_runs)


def _doctor(options: argparse.Namespace) -> int:
    from megatron_dsrl.doctor.doctor import examine, print_as_json, print_for_people

    examination = examine()
    (print_as_json if options.json else print_for_people)(examination)
    return 0 if examination.can_run else 1


def _completion(options: argparse.Namespace) -> int:
    try:
        import shtab
    except ModuleNotFoundError as error:
        raise UserError("tab completion needs the package shtab: pip install shtab") from error
    print(shtab.complete(_parser(), options.shell))
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    options, rest = _parser().parse_known_args(arguments)
    # argparse gives up on `config --dry-run key=value`: positionals after an option are left over.
    overrides = [word for word in rest if "=" in word and not word.startswith("-")]
    unknown = [word for word in rest if word not in overrides]
    if unknown or (overrides and not hasattr(options, "overrides")):
        options.parser.error(f"unrecognized arguments: {' '.join(unknown or overrides)}")
    if overrides:
        options.overrides = [*options.overrides, *overrides]
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dsrl",
        description="RL with verifiable rewards in pre-train and post-train space on Megatron-core and SGLang.",
    )
    parser.add_argument("--version", action="version", version=f"megatron-dsrl {__version__}")
    commands = subcommands(parser, "commands", "COMMAND")
    _add_train(commands)
    add_config_command(commands)
    _add_fetch(commands)
    add_convert(commands)
    add_eval(commands)
    add_plan(commands)
    _add_report(commands)
    add_trace(commands)
    add_upload(commands)
    add_samples(commands)
    _add_rollout(commands)
    add_compare(commands)
    add_rescore(commands)
    add_push(commands)
    add_table(commands)
    add_analyse(commands)
    _add_sweep(commands)
    _add_doctor(commands)
    _add_completion(commands)
    return parser


def _add_train(commands: Commands) -> None:
    parser = add_command(
        commands,
        "train",
        _train,
        help="train as a configuration file says",
        description="Train as a configuration file says. The same command continues an interrupted run.",
        epilog="example: dsrl train configs/tiny_dsrl.yaml rollout.temperature=0.7 phases.0.until_step=5 --dry-run",
    )
    add_config(parser)
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check everything that can be checked beforehand, print the resolved configuration and what it amounts "
        "to, and start nothing",
    )
    add_processes(parser, " (with --dry-run: check for N)")
    parser.add_argument("-v", "--verbose", action="store_true", help="print every figure of a step, not the main ones")


def _add_fetch(commands: Commands) -> None:
    parser = add_command(
        commands,
        "fetch",
        _fetch,
        help="have the hub's part of a run in its cache",
        description="Read the model, tokenizer and prompts of a run, and benchmarks, in one process. What comes from "
        "the hub is in its cache (HF_HOME) afterwards, for all ranks and for machines without a network.",
        epilog="example: dsrl fetch configs/dsrl_qwen3_8b.yaml --benchmarks math500,aime24",
    )
    add_config(parser)
    parser.add_argument(
        "--benchmarks",
        metavar="NAME,NAME",
        type=lambda text: [name for name in text.split(",") if name],
        default=[],
        help="names or .yaml files, as for `dsrl eval`",
    )


def _add_rollout(commands: Commands) -> None:
    parser = add_command(
        commands,
        "rollout",
        _rollout,
        help="sample what a run would sample, without training",
        description="Sample the steps of a run with the weights of its model folder, without a trainer. A run with "
        "rollout.replay_from trains on the result without engines.",
        epilog="example: dsrl rollout configs/tiny_dsrl.yaml name=sampled steps=2",
    )
    add_config(parser)
    add_processes(parser)


def _add_report(commands: Commands) -> None:
    parser = add_command(
        commands,
        "report",
        _report,
        help="write the HTML report of a run, or of several side by side",
        description="Write one self-contained HTML page with plots, also while a run is still going: RUN/report.html, "
        "or for several runs a comparison, comparison.html in the first folder.",
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="run folder, such as runs/tiny_dsrl")
    parser.add_argument("--output", metavar="FILE", type=Path, help="write the page to this file instead")
    parser.add_argument(
        "--figure", metavar="FILE", type=Path, help="write the learning curve as an SVG file, in place of the page"
    )


def _add_sweep(commands: Commands) -> None:
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


def _add_doctor(commands: Commands) -> None:
    parser = add_command(
        commands,
        "doctor",
        _doctor,
        help="say what is installed, what is missing, and what to do about it",
        description="Say what is installed, which devices and kernels there are, what is missing, and what to do. Exit "
        "status 0 when a CPU or a GPU run is possible, else 1.",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")


def _add_completion(commands: Commands) -> None:
    parser = add_command(
        commands,
        "completion",
        _completion,
        help="print a script by which a shell completes commands and options",
        description="Print a script by which a shell completes commands and options at the tab key.",
        epilog="example: dsrl completion bash > ~/.local/share/bash-completion/completions/dsrl",
    )
    parser.add_argument("shell", choices=("bash", "zsh", "tcsh"), help="which shell")


if __name__ == "__main__":
    sys.exit(main())
