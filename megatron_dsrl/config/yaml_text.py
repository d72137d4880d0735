"""YAML text to plain data and back, without the surprises of YAML 1.1.

PyYAML's safe loader, with four differences: `1e-6` is a float (YAML 1.2's rule; YAML 1.1 wants `1.0e-6`), `010` and
`1:30` are not numbers (YAML 1.1: 8 and 90), dates stay strings, and a repeated key is an error. `parse_yaml` also gives
the line of every value, for messages. `format_yaml` writes text that `parse_yaml` reads back to equal data.
"""

import re
from pathlib import Path
from typing import Any

import yaml
from yaml.reader import ReaderError

from megatron_dsrl.common.errors import UserError

KeyPath = tuple[str | int, ...]
"""Keys and list positions from the root of a document down to a value."""

_TIMESTAMP_TAG = "tag:yaml.org,2002:timestamp"
_INT_TAG = "tag:yaml.org,2002:int"
_FLOAT_TAG = "tag:yaml.org,2002:float"
_UNICODE_LINE_BREAK = re.compile("[\x85\u2028\u2029]")
_INT = re.compile(r"^[-+]?(?:0|[1-9][0-9_]*|0b[01_]+|0x[0-9a-fA-F_]+)$")
_FLOAT = re.compile(
    r"^[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?"
    r"|[0-9][0-9_]*[eE][-+]?[0-9]+"
    r"|\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?"
    r"|\.(?:inf|Inf|INF|nan|NaN|NAN))$"
)
_TEMPLATE_WITHOUT_QUOTES = re.compile(r"(?:^|[:\-,\[{]\s)\s*(\{[{%#])")
_QUOTES = "a template, such as {{ problem }}, needs quotes around it: '{{ problem }}'"
MAX_VALUES = 100_000
MAX_DEPTH = 50


def _with_our_scalars(resolvers: dict[str, list]) -> dict[str, list]:
    """PyYAML's table of implicit scalar types by first character, with our rules for numbers and without dates."""
    table = {
        first: [(tag, rule) for tag, rule in rules if tag not in (_TIMESTAMP_TAG, _INT_TAG, _FLOAT_TAG)]
        for first, rules in resolvers.items()
    }
    for first in "-+.0123456789":
        table.setdefault(first, []).extend([(_INT_TAG, _INT), (_FLOAT_TAG, _FLOAT)])
    return table


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = _with_our_scalars(yaml.SafeLoader.yaml_implicit_resolvers)


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers = _with_our_scalars(yaml.SafeDumper.yaml_implicit_resolvers)

    def ignore_aliases(self, data: Any) -> bool:
        """Equal values are written out each time."""
        return True

    def represent_text(self, text: str) -> yaml.ScalarNode:
        """A string, in double quotes if it has Unicode line breaks."""
        # PyYAML's single quotes turn Unicode line breaks into spaces; double quotes escape them.
        style = '"' if _UNICODE_LINE_BREAK.search(text) else None
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _Dumper.represent_text)


def read_text(path: Path) -> str:
    """The text of a file in UTF-8. Raises ValueError, which says why, if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not text in UTF-8 ({error})") from error
    except OSError as error:
        raise ValueError(error.strerror) from error


def parse_yaml(text: str, source: str) -> tuple[Any, dict[KeyPath, int]]:
    """Parse one YAML document; `source` is its name in messages (a file, or an override).

    Returns the data and the line (from 1) of every value by its key path. Aliases are copies: changing one place does
    not change the others. Raises UserError, which names the line, for text that is not YAML, a repeated key, a key that
    is not a single value, or more than `MAX_VALUES` values or `MAX_DEPTH` levels, aliases expanded.
    """
    loader: _Loader | None = None
    try:
        loader = _Loader(text)  # reads the first characters and may refuse them
        root = loader.get_single_node()
        lines: dict[KeyPath, int] = {}
        if root is None:
            return None, lines
        _note_lines(root, (), source, lines)
        return _without_sharing(loader.construct_document(root)), lines
    except UserError:
        raise
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a number that Python does not read, such as 0x_
        raise UserError(f"{source}: not valid YAML: {_describe(error, text)}") from error
    except RecursionError as error:
        raise UserError(f"{source}: not valid YAML: {_TOO_DEEP}") from error
    finally:
        if loader is not None:
            loader.dispose()


def format_yaml(data: Any) -> str:
    """Write plain data as YAML, keys in the given order."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


_TOO_DEEP = f"sections and lists are nested more than {MAX_DEPTH} levels deep"


def _without_sharing(data: Any) -> Any:
    """A copy without the sections and lists that PyYAML shares between the places of an alias."""
    if isinstance(data, dict):
        return {key: _without_sharing(value) for key, value in data.items()}
    return [_without_sharing(item) for item in data] if isinstance(data, list) else data


def _note_lines(node: yaml.Node, path: KeyPath, source: str, lines: dict[KeyPath, int]) -> None:
    """Fill `lines` from the node tree; refuses repeated keys, which PyYAML would silently let win."""
    line = lines[path] = node.start_mark.line + 1
    if len(path) > MAX_DEPTH:  # also catches an alias that contains itself
        raise UserError(f"{source}, line {line}: {_TOO_DEEP}; an alias (`*name`) may contain itself")
    if len(lines) > MAX_VALUES:
        raise UserError(
            f"{source}, line {line}: more than {MAX_VALUES:,} values, with each alias (`*name`) counted as often as it "
            "is used"
        )
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                line = key.start_mark.line + 1
                raise UserError(f"{source}, line {line}: {_dotted(path)}a key must be a single value; {_QUOTES}")
            if key.value in seen:
                place = _dotted((*path, key.value))
                raise UserError(f"{source}, line {key.start_mark.line + 1}: {place}this key appears twice")
            seen.add(key.value)
            here = (*path, int(key.value) if key.tag == _INT_TAG and key.value.isdecimal() else key.value)
            _note_lines(value, here, source, lines)
            lines[here] = key.start_mark.line + 1
    elif isinstance(node, yaml.SequenceNode):
        for position, value in enumerate(node.value):
            _note_lines(value, (*path, position), source, lines)


def _dotted(path: KeyPath) -> str:
    return ".".join(map(str, path)) + ": " if path else ""


def _describe(error: Exception, text: str) -> str:
    """One line for an error of PyYAML or of a number's conversion, with its line in the text where known."""
    if isinstance(error, ReaderError):
        line = text.count("\n", 0, error.position) + 1
        return f"line {line}: it contains the character U+{ord(text[error.position]):04X}, which YAML does not allow"
    problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    marks = [mark for name in ("problem_mark", "context_mark") if (mark := getattr(error, name, None))]
    if not marks:
        return problem
    if "'\\t'" in problem:
        problem += "; indent with spaces, not tabs"
    if problem == "but found another document":
        problem = "a second document begins (---); keep one"
    rows = text.splitlines()
    near = (rows[mark.line] for mark in marks if mark.line < len(rows))
    hint = f"; {_QUOTES}" if any(map(_TEMPLATE_WITHOUT_QUOTES.search, near)) else ""
    return f"line {marks[0].line + 1}, column {marks[0].column + 1}: {problem}{hint}"
