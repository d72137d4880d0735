"""`dsrl completion`."""

import argparse
from functools import partial

from megatron_dsrl.commands.arguments import Commands, add_command
from megatron_dsrl.common.errors import UserError


def add_completion(commands: Commands, program: argparse.ArgumentParser) -> None:
    """Register the command. `program` is the parser of `dsrl` itself."""
    parser = add_command(
        commands,
        "completion",
        partial(_completion, program),
        help="print a shell completion script",
        description="Print a script that makes the shell complete commands and options.",
        epilog="example: dsrl completion bash > ~/.local/share/bash-completion/completions/dsrl",
    )
    parser.add_argument("shell", choices=("bash", "zsh", "tcsh"), help="your shell")


def _completion(program: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    try:
        import shtab
    except ModuleNotFoundError as error:
        raise UserError("tab completion needs the package shtab: pip install shtab") from error
    print(shtab.complete(program, options.shell))
    return 0
