"""`dsrl config`, `doctor` and `completion`: help with the set-up. Heavy modules are only imported when one runs."""

import argparse
from functools import partial

from megatron_dsrl.commands.arguments import Command, Commands, add_command
from megatron_dsrl.common.errors import UserError

KIND_NAMES = ("run", "sweep", "benchmark", "eval", "gradients")


def add_config_command(commands: Commands) -> None:
    parser = add_command(
        commands,
        "config",
        _config,
        "explain fields of the configuration: types, defaults, choices",
        epilog="example: dsrl config rollout.top_p; dsrl config phases.loss; dsrl config phases.loss.gspo",
    )
    parser.add_argument("key", metavar="KEY", nargs="?", help="dotted path; you may leave out positions in lists")
    parser.add_argument(
        "--kind",
        choices=KIND_NAMES,
        default="run",
        help="what is configured: a run (default), a sweep, a benchmark, or the overrides of `dsrl eval` or "
        "`dsrl analyse gradients`",
    )
    parser.add_argument("--schema", action="store_true", help="print the JSON schema, for editors")


def _config(options: argparse.Namespace) -> int:
    """Explain a field or a section of the configuration: type, default, limits, choices and meaning. Without a key,
    show the top level."""
    from megatron_dsrl.config.kinds import KINDS, as_text

    kind = KINDS[options.kind]
    if options.schema:
        print(as_text(kind.schema()), end="")
        return 0
    from rich.console import Console

    from megatron_dsrl.config.describe import Place, find
    from megatron_dsrl.config.show import show

    console = Console(highlight=False, emoji=False)
    if not options.key:
        show(Place("", kind.section), console)
        console.print(f"\nThis is {kind.where}. `dsrl config KEY` explains a key.")
        return 0
    for number, place in enumerate(find(kind.section, options.key)):
        if number:
            console.print()
        show(place, console)
    return 0


def add_doctor(commands: Commands) -> None:
    parser = add_command(commands, "doctor", _doctor, "check the installation and say how to fix problems")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")


def _doctor(options: argparse.Namespace) -> int:
    """List installed packages, devices and kernels, what is missing and how to fix it. Exit with status 0 if a CPU or
    GPU run is possible, otherwise 1."""
    from megatron_dsrl.doctor.doctor import examine, print_as_json, print_for_people

    examination = examine()
    (print_as_json if options.json else print_for_people)(examination)
    return 0 if examination.can_run else 1


def add_completion(commands: Commands, program: Command) -> None:
    """Register the command. `program` is the parser of `dsrl` itself."""
    parser = add_command(
        commands,
        "completion",
        partial(_completion, program),
        "print a shell completion script",
        description="Print a script that makes the shell complete commands and options.",
        epilog="example: dsrl completion bash > ~/.local/share/bash-completion/completions/dsrl",
    )
    parser.add_argument("shell", choices=("bash", "zsh", "tcsh"), help="your shell")


def _completion(program: Command, options: argparse.Namespace) -> int:
    try:
        import shtab
    except ModuleNotFoundError as error:
        raise UserError("tab completion needs the package shtab: pip install shtab") from error
    print(shtab.complete(program, options.shell))
    return 0
