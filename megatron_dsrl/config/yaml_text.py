"""YAML text to plain data and back, without the surprises of YAML 1.1.

PyYAML's safe loader, with three differences: `1e-6` is a float (YAML 1.2's rule; YAML 1.1 wants `1.0e-6`), dates stay
strings, and a key that is given twice is an error. `parse_yaml` also says on which line every value stands, so that an
error about a value can name its place. `format_yaml` writes text that `parse_yaml` reads back to equal data.
"""

import re
from typing import Any

import yaml

from megatron_dsrl.common.errors import UserError

KeyPath = tuple[str | int, ...]
"""Keys and list positions from the root of a document down to a value."""

_TIMESTAMP_TAG = "tag:yaml.org,2002:timestamp"
_INT_TAG = "tag:yaml.org,2002:int"
_FLOAT_TAG = "tag:yaml.org,2002:float"
_UNICODE_LINE_BREAK = re.compile("[\x85\u2028\u2029]")
_FLOAT = re.compile(
    r"^[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?"
    r"|[0-9][0-9_]*[eE][-+]?[0-9]+"
    r"|\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?"
    r"|\.(?:inf|Inf|INF|nan|NaN|NAN))$"
)


def _with_our_scalars(resolvers: dict[str, list]) -> dict[str, list]:
    """PyYAML's table of implicit scalar types by first character, with our float rule and without dates."""
    table = {
        first: [(tag, rule) for tag, rule in rules if tag not in (_TIMESTAMP_TAG, _FLOAT_TAG)]
        for first, rules in resolvers.items()
    }
    for first in "-+.0123456789":
        table.setdefault(first, []).append((_FLOAT_TAG, _FLOAT))
    return table


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = _with_our_scalars(yaml.SafeLoader.yaml_implicit_resolvers)


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers = _with_our_scalars(yaml.SafeDumper.yaml_implicit_resolvers)

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_text(self, text: str) -> yaml.ScalarNode:
        # PyYAML's single quotes turn Unicode line breaks into spaces; double quotes escape them.
        style = '"' if _UNICODE_LINE_BREAK.search(text) else None
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _Dumper.represent_text)


def parse_yaml(text: str, source: str) -> tuple[Any, dict[KeyPath, int]]:
    """Parse one YAML document; `source` is its name in messages (a file, or an override).

    Returns the data and the line (from 1) of every value by its key path. Raises UserError with the line for text
    that is not YAML and for a repeated key.
    """
    loader = _Loader(text)
    try:
        root = loader.get_single_node()
        lines: dict[KeyPath, int] = {}
        if root is None:
            return None, lines
        _note_lines(root, (), source, lines)
        return loader.construct_document(root), lines
    except yaml.YAMLError as error:
        raise UserError(f"{source}: not valid YAML: {_describe(error)}") from error
    finally:
        loader.dispose()


def format_yaml(data: Any) -> str:
    """Write plain data as YAML, keys in the given order."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def _note_lines(node: yaml.Node, path: KeyPath, source: str, lines: dict[KeyPath, int]) -> None:
    """Fill `lines` from the node tree; refuses repeated keys, which PyYAML would silently let win."""
    lines[path] = node.start_mark.line + 1
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            if key.value in seen:
                place = ".".join(map(str, (*path, key.value)))
                raise UserError(f"{source}, line {key.start_mark.line + 1}: {place}: this key is given twice")
            seen.add(key.value)
            here = (*path, int(key.value) if key.tag == _INT_TAG and key.value.isdecimal() else key.value)
            _note_lines(value, here, source, lines)
            lines[here] = key.start_mark.line + 1
    elif isinstance(node, yaml.SequenceNode):
        for position, value in enumerate(node.value):
            _note_lines(value, (*path, position), source, lines)


def _describe(error: yaml.YAMLError) -> str:
    """One line for a PyYAML error, with its line number where it has one."""
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    return f"line {mark.line + 1}, column {mark.column + 1}: {problem}" if mark else problem
