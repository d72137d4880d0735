"""Shared by the commands: registration, common arguments, argument types."""

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from inspect import cleandoc
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from megatron_dsrl.common.errors import UserError

if TYPE_CHECKING:
    from megatron_dsrl.config.run import RunConfig

Commands: TypeAlias = "argparse._SubParsersAction[Command]"
"""What `add_subparsers` returns; argparse has no public name for it."""

FILES = {"bash": "_shtab_compgen_files", "zsh": "_files", "tcsh": "f"}
"""Tab completion of file arguments. Equals `shtab.FILE`, but without importing shtab for every command."""


class Command(argparse.ArgumentParser):
    """The parser of `dsrl` or of a command, and the arguments that several commands have."""

    def subcommands(self, title: str, metavar: str) -> Commands:
        """Give it subcommands. Without one it prints its help."""
        self.set_defaults(command=_print_help, parser=self)
        return self.add_subparsers(title=title, metavar=metavar)

    def add_config(self) -> None:
        """Add a run's configuration files and overrides, for `read_config`. Both are words of `config` until
        `files_and_overrides` tells them apart."""
        config = self.add_argument(
            "config", metavar="CONFIG.yaml", nargs="+", help="configuration file; of several, the later wins"
        )
        config.complete = FILES  # type: ignore[attr-defined]
        self.add_overrides("override a field of the files; values are YAML, list positions are numbers")

    def add_overrides(self, meaning: str) -> None:
        """Add any number of `key.path=value` arguments."""
        # With a default, argparse does not name it among missing arguments.
        self.add_argument("overrides", metavar="KEY.PATH=VALUE", nargs="*", default=[], help=meaning)

    def add_processes(self, more: str = "") -> None:
        """Add `--processes`, for commands that torchrun and srun can also start."""
        self.add_argument(
            "--processes",
            "--gpus",
            metavar="N",
            type=positive,
            help=f"run N processes on this machine, one per GPU{more}; for several machines use srun or torchrun",
        )


def add_command(
    commands: Commands, name: str, run: Callable[[argparse.Namespace], int], summary: str, **texts: Any
) -> Command:
    """Add a command. `run` returns the exit status; its docstring is the description, unless `texts` for argparse has
    another."""
    parser = commands.add_parser(name, help=summary, **{"description": cleandoc(run.__doc__ or ""), **texts})
    parser.set_defaults(command=run, parser=parser)
    return parser


def _print_help(options: argparse.Namespace) -> int:
    options.parser.print_help(sys.stderr)
    return 2


def read_config(options: argparse.Namespace) -> "RunConfig":
    """The run's configuration; see `load_config`."""
    from megatron_dsrl.config.load import load_config

    return load_config(options.config, options.overrides)


def files_and_overrides(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Tell configuration files from `key.path=value`. The first word is a file; keys have no slash."""
    overrides = [word for word in words[1:] if "=" in word and "/" not in word.partition("=")[0]]
    return [*words[:1], *(word for word in words[1:] if word not in overrides)], overrides


def names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def positive(text: str) -> int:
    """For `type=`: an integer above 0. Raises ArgumentTypeError for anything else."""
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text}")
    return value


def positive_number(text: str) -> float:
    """For `type=`: a finite number above 0. Raises ArgumentTypeError for anything else."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text}")
    return value


def labelled_folders(texts: Sequence[str]) -> dict[str, list[Path]]:
    """Folders by label, from `LABEL=FOLDER,FOLDER` or `FOLDER`, whose name then becomes the label. Raises UserError if
    a label or a folder is named twice, or a label has no folder."""
    labelled: dict[str, list[Path]] = {}
    for text in texts:
        label, equals, listed = text.partition("=")
        if not equals or Path(text).is_dir():
            label, listed = Path(text).resolve().name, text
        folders = [Path(folder).expanduser() for folder in listed.split(",") if folder]
        if label in labelled or not folders:
            what = "is named twice" if label in labelled else "has no folder"
            raise UserError(f"`{text}`: {label} {what}; write LABEL=FOLDER,FOLDER, each label once")
        twice = [folder for folder in folders if folders.count(folder) > 1]
        if twice:
            raise UserError(f"`{text}`: {twice[0]} is named twice, and would count as two runs; remove one")
        labelled[label] = folders
    return labelled
