"""The `dsrl` command.

User errors print one message to stderr and exit with status 2, Ctrl-C with 130, SIGTERM with 143, SIGHUP (a closed
terminal) with 129, SIGUSR1 with 138, a reader that closes the pipe (`| head`) with 141. An engine lost after all its
restarts gives one message and status 1; bugs show a traceback and exit with 1. Each command imports what it needs when
it runs, so that `--help`, `--dry-run` and `doctor` stay light.
"""

import argparse
import io
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from megatron_dsrl import __version__
from megatron_dsrl.commands import analyse, convert, evaluation, hub, plan, report, rollout, setup, train
from megatron_dsrl.commands.arguments import Command, files_and_overrides
from megatron_dsrl.common.cpu_threads import limit_spinning
from megatron_dsrl.common.disk import remedy
from megatron_dsrl.common.errors import MachineError, UserError
from megatron_dsrl.common.lost_output import leave_closed_pipe, leave_terminal
from megatron_dsrl.common.process import end_with_launcher, launched_rank
from megatron_dsrl.common.stop_signals import STOP_SIGNALS, end_at_next_signal, handling_signals, interrupt

MACHINE_ERROR_STATUS = 1
USER_ERROR_STATUS = 2
INTERRUPTED_STATUS = 130
CLOSED_PIPE_STATUS = 141


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    end_with_launcher()
    limit_spinning()
    _print_every_character()
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        with _flushing_output():
            _find_modules_here()
            options = _parse(arguments)
            with _ended_by_signals():
                return _run(options, arguments)
    except UserError as error:
        _print_error(str(error))
        return USER_ERROR_STATUS
    except MachineError as error:
        _print_error(str(error))
        return MACHINE_ERROR_STATUS
    except _EndedBySignal as end:
        _print_error("interrupted" if end.number == signal.SIGINT else f"ended by {end.number.name}")
        return 128 + end.number
    except KeyboardInterrupt:
        _print_error("interrupted")
        return INTERRUPTED_STATUS
    except BrokenPipeError:
        if not leave_closed_pipe():
            raise
        return CLOSED_PIPE_STATUS
    except OSError as error:
        if (advice := remedy(error)) is None:
            raise
        _print_error(f"{error.filename or 'a file'}: {error.strerror}; {advice}")
        return USER_ERROR_STATUS


def _print_every_character() -> None:
    """Print characters that the output's encoding lacks, and bytes of file names that are not text, as escapes."""
    output = sys.stdout
    if isinstance(output, io.TextIOWrapper) and (output.encoding.lower() != "utf-8" or output.errors == "strict"):
        output.reconfigure(errors="backslashreplace")


def _find_modules_here() -> None:
    """Modules in the current folder are found by their dotted paths, as with `python -m`."""
    try:
        here = os.getcwd()
    except FileNotFoundError as error:
        raise UserError("the current folder no longer exists; change to another one") from error
    if here not in sys.path:
        sys.path.insert(0, here)


def _run(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    """Run in this process, or with `--processes` start the command in that many processes. A dry run needs only one."""
    if getattr(options, "processes", None) is not None and not getattr(options, "dry_run", False):
        from megatron_dsrl.run.launch import launch, others_started

        if not others_started(options.processes):
            return launch([sys.executable, "-m", "megatron_dsrl.cli", *arguments], options.processes)
    return options.command(options)


@contextmanager
def _flushing_output() -> Iterator[None]:
    """Flush the output, including that of `--help`, so that a closed pipe is noticed here and not at exit."""
    try:
        yield
    except SystemExit as end:
        if isinstance(end.__context__, BrokenPipeError):  # how Rich exits on a closed pipe, with another status
            raise SystemExit(CLOSED_PIPE_STATUS) from end
        print(end="", flush=True)
        raise
    print(end="", flush=True)


class _EndedBySignal(KeyboardInterrupt):
    """Unwinds the stack, so that engines are shut down."""

    def __init__(self, number: int) -> None:
        self.number = signal.Signals(number)
        super().__init__(self.number.name)


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """A signal ends the block with _EndedBySignal."""
    received: list[_EndedBySignal] = []

    def end(number: int, frame: FrameType | None) -> None:
        end_at_next_signal()
        if number == signal.SIGHUP:
            leave_terminal()
        received.append(_EndedBySignal(number))
        interrupt(received[0])

    with handling_signals(STOP_SIGNALS, end):
        try:
            yield
        except Exception as error:
            if not received:
                raise
            # Imports of compiled modules swallow the exception and fail later; collectives fail if another rank has
            # ended.
            raise received[0] from error


def _print_error(message: str) -> None:
    """Every rank hits a wrong configuration, but only rank 0 reports it; `commands/train.py` names other ranks."""
    if launched_rank() == 0:
        print(f"dsrl: {message}", file=sys.stderr, flush=True)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    options, rest = _parser().parse_known_args(arguments)
    # argparse cannot parse `config --dry-run key=value`: it does not consume positionals that follow an option.
    takes_files = hasattr(options, "config") and hasattr(options, "overrides")
    words = [word for word in rest if not word.startswith("-") and ("=" in word or takes_files)]
    unknown = [word for word in rest if word not in words]
    if unknown or (words and not hasattr(options, "overrides")):
        fields = [word.lstrip("-") for word in unknown if "=" in word] if hasattr(options, "overrides") else []
        hint = f"; fields are set without dashes: {' '.join(fields)}" if fields else ""
        options.parser.error(f"unrecognized arguments: {' '.join(unknown or words)}{hint}")
    if takes_files:
        options.config, options.overrides = files_and_overrides([*options.config, *options.overrides, *words])
    elif words:
        options.overrides = [*options.overrides, *words]
    return options


def _parser() -> Command:
    parser = Command(
        prog="dsrl",
        description="RL with verifiable rewards in pre-train and post-train space on Megatron-core and SGLang.",
    )
    parser.add_argument("--version", action="version", version=f"megatron-dsrl {__version__}")
    commands = parser.subcommands("commands", "COMMAND")
    train.add_train(commands)
    train.add_sft(commands)
    train.add_sweep(commands)
    rollout.add_rollout(commands)
    rollout.add_serve(commands)
    rollout.add_samples(commands)
    evaluation.add_eval(commands)
    evaluation.add_rescore(commands)
    evaluation.add_table(commands)
    report.add_report(commands)
    report.add_trace(commands)
    report.add_compare(commands)
    report.add_upload(commands)
    analyse.add_analyse(commands)
    plan.add_plan(commands)
    convert.add_convert(commands)
    hub.add_fetch(commands)
    hub.add_push(commands)
    setup.add_config_command(commands)
    setup.add_doctor(commands)
    setup.add_completion(commands, parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
