"""The project's Markdown documents: their commands, and the names that they use."""

import ast
import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel

from megatron_dsrl.config.registry import Options
from megatron_dsrl.config.run import RunConfig
from tests.support.tiny_run import REPOSITORY

REFERENCE = REPOSITORY / "configs" / "README.md"
DOCUMENTS = [
    REPOSITORY / "README.md",
    REPOSITORY / ".github" / "CONTRIBUTING.md",
    REFERENCE,
    *sorted((REPOSITORY / "examples").glob("*/README.md")),
]
FOLDERS = ("configs", "examples", "megatron_dsrl", "slurm", "tests", "tools")
"""A text that begins with one of these and a slash names a file of the repository."""

MADE_UP = ("configs/mine.yaml",)
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
PROGRAMS = ("dsrl", "python", "torchrun", "bash", "sbatch", "pytest", "docker", "tensorboard", "torchfrtrace")
"""Code within the text that begins with one of these, and has arguments, is a command."""


@dataclass(frozen=True)
class Command:
    """A command of a document, and the output that the document shows of it."""

    line: str
    """Without its comment."""
    setting: tuple[str, ...]
    """Lines before it in its block that set variables or enter an environment."""
    words: tuple[str, ...]
    """As the shell would split them, without variables before the command."""
    shown: tuple[str, ...]

    def dsrl_arguments(self) -> list[str] | None:
        """What follows `dsrl`, or `python -m megatron_dsrl.cli` with or without torchrun; None for other commands."""
        if self.words[:1] == ("dsrl",):
            return list(self.words[1:])
        if "megatron_dsrl.cli" in self.words:
            return list(self.words[self.words.index("megatron_dsrl.cli") + 1 :])
        return None


def name(document: Path) -> str:
    return str(document.relative_to(REPOSITORY))


@cache
def commands(document: Path) -> tuple[Command, ...]:
    """All commands of the blocks without a language, and those within the text that are more than a name."""
    text = document.read_text(encoding="utf-8")
    found = [command for block in _blocks(text, "") for command in _of_block(block.replace("\\\n", " "))]
    # The text of the configuration reference is made of the fields' docstrings, which name commands in passing.
    prose = "" if document == REFERENCE else BLOCK.sub("", text)
    inline = [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose)]
    return (*found, *(_command(code, [], []) for code in inline if _is_command(code)))


def _is_command(code: str) -> bool:
    """`dsrl plan` and `python -m module` are names, and so is a command with placeholders."""
    program, *arguments = re.sub(r"^([A-Z_]+=\S* )+", "", code).split()[:4] or [""]
    name_only = len(arguments) < {"dsrl": 2, "python": 3 if "-m" in arguments else 1}.get(program, 1)
    return program in PROGRAMS and not name_only and not re.search(r"\.\.\.|KIND", code)


def _blocks(text: str, language: str) -> list[str]:
    return [inside for marked, inside in BLOCK.findall(text) if marked == language]


def _of_block(block: str) -> Iterator[Command]:
    lines = block.splitlines()
    with_output = any(line.startswith("$ ") for line in lines)
    starts = [i for i, line in enumerate(lines) if line.startswith("$ ") or not with_output]
    setting: list[str] = []
    for start, end in zip(starts, [*starts[1:], len(lines)]):
        line = re.sub(r"\s+#\s.*$", "", lines[start].removeprefix("$ "))
        if re.match(r"(export |source )|\w+=(\"[^\"]*\"|\S*)$", line):
            setting.append(line)
        elif line:
            yield _command(line, setting, lines[start + 1 : end])


def _command(line: str, setting: list[str], shown: list[str]) -> Command:
    words = shlex.split(line)
    if re.search(r"\$\w", line):
        script = "\n".join([*(each for each in setting if "=" in each), f"printf '%s\\0' {line}"])
        printed = subprocess.run(["bash", "-euc", script], check=True, stdout=subprocess.PIPE, text=True, timeout=10)
        words = printed.stdout.split("\0")[:-1]
    while re.match(r"[A-Z_]+=", words[0]):
        words.pop(0)
    return Command(line, tuple(setting), tuple(words), tuple(filter(None, shown)))


def broken_anchors(document: Path) -> list[str]:
    """Links to a heading that its document does not have."""
    links = re.findall(r"\]\((?!\w+://)([^)#\s]*)#([^)\s]+)\)", document.read_text(encoding="utf-8"))
    return [
        f"{file}#{anchor}"
        for file, anchor in links
        if anchor not in _anchors((document.parent / file) if file else document)
    ]


@cache
def _anchors(document: Path) -> set[str]:
    """The names that GitHub gives the headings."""
    headings = re.findall(r"^#+ (.*)$", BLOCK.sub("", document.read_text(encoding="utf-8")), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def files_named(document: Path) -> list[Path]:
    """Targets of links, and paths of the repository in code."""
    text = document.read_text(encoding="utf-8")
    links = [target.partition("#")[0] for target in re.findall(r"\]\(([^)]+)\)", text) if "://" not in target]
    files = [document.parent / link for link in links if link]
    for path in re.findall(rf"(?<![\w./$-])(?:{'|'.join(FOLDERS)})/[\w./*-]+", text):
        if path not in MADE_UP and "*" not in path:
            files.append(REPOSITORY / path.rstrip("."))
    return files


def fields_named(document: Path) -> list[str]:
    """Fields of a run's configuration in `code`, such as `engine.port`, also with `=value` behind."""
    text = re.sub(r"^\| verl, .*?\n\n", _without_first_column, document.read_text(encoding="utf-8"), flags=re.M | re.S)
    code = re.findall(r"`([a-z_]+(?:\.[a-z_0-9]+)*)(?:=[^`]*)?`", text)
    fields = [path for path in code if "." in path and path.split(".")[0] in RunConfig.model_fields]
    return [path for path in fields if not path.endswith((".py", ".yaml", ".jsonl"))]


def _without_first_column(table: re.Match[str]) -> str:
    """The table without its first column, which has the keys of another program."""
    return re.sub(r"^\| [^|]*", "", table[0], flags=re.M)


def is_field(path: str, section: type[BaseModel] = RunConfig) -> bool:
    """Whether a run's configuration can have this field. Options of registered choices count under any choice."""
    first, _, rest = path.partition(".")
    if first.isdecimal():
        return not rest or is_field(rest, section)
    kinds = [section] if section is not Options else list(_descendants(Options))
    annotations = [kind.model_fields[first].annotation for kind in kinds if first in kind.model_fields]
    if not annotations or not rest:
        return bool(annotations)
    inner = [kind for annotation in annotations for kind in _sections_in(annotation)]
    return any(is_field(rest, kind) for kind in inner) or (not inner and dict in map(_origin, annotations))


def _sections_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [kind for part in get_args(annotation) for kind in _sections_in(part)]


def _origin(annotation: Any) -> Any:
    return getattr(annotation, "__origin__", annotation)


def _descendants(kind: type) -> Iterator[type]:
    for child in kind.__subclasses__():
        yield child
        yield from _descendants(child)


def messages_quoted(document: Path) -> list[str]:
    """Lines of the blocks marked `text`: messages of the program, with an ellipsis for what varies."""
    blocks = _blocks(document.read_text(encoding="utf-8"), "text")
    return [line for block in blocks for line in block.splitlines() if line]


def is_message(quoted: str) -> bool:
    """Whether the program has a message with these parts, in this order."""
    pattern = re.compile(".*".join(re.escape(part.strip()) for part in quoted.split("…")), re.S)
    return any(pattern.search(message) for message in _messages())


@cache
def _messages() -> list[str]:
    """Every string of the program, with its variable parts left out, and the job scripts."""
    found = [file.read_text() for file in (REPOSITORY / "slurm").glob("*.sh")]
    for root, _, files in os.walk(REPOSITORY / "megatron_dsrl"):
        for file in files:
            if file.endswith(".py"):
                tree = ast.parse((Path(root) / file).read_text(encoding="utf-8"))
                found += [text for node in ast.walk(tree) if (text := _text(node)) is not None]
    return found


def _text(node: ast.AST) -> str | None:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "\0" for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return (_text(node.left) or "\0") + (_text(node.right) or "\0")
    return None
