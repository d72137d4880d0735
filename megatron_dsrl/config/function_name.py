"""Functions that a configuration names: built-in ones by a name, others by a dotted path `package.module:function`."""

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import Any

from pydantic import GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import core_schema

from megatron_dsrl.config.dotted_path import PATTERN

GIVEN = ("response", "answer", "prompt")
"""Arguments that every caller passes; the others are options."""


@dataclass(frozen=True)
class FunctionOption:
    """A keyword argument of a function."""

    name: str
    default: Any
    """`inspect.Parameter.empty` where it is required."""
    meaning: str


class FunctionName:
    """In the `Annotated` of a text field: it names such a function. For documentation; the function is looked up, and a
    wrong name refused, where it is used."""

    def __init__(self, kind: str, table: str) -> None:
        """
        Args:
            kind: what the function is.
            table: dotted path of a mapping from the built-in names to objects whose `function` is a dotted path;
                imported when it is asked for.
        """
        self.kind = kind
        self._table = table

    def names(self) -> list[str]:
        return list(resolve_name(self._table))

    def functions(self) -> dict[str, Callable[..., Any]]:
        """The built-in functions by their names."""
        return {name: resolve_name(entry.function) for name, entry in resolve_name(self._table).items()}

    def __get_pydantic_json_schema__(
        self, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        described: dict[str, Any] = handler(schema)
        return described | {"anyOf": [{"enum": self.names()}, {"pattern": PATTERN}]}


def options_of(function: Callable[..., Any]) -> list[FunctionOption]:
    """What a configuration may set of a function, with the meaning from the `Args:` of its docstring.

    Args:
        function: with a docstring in Google's style.
    """
    meanings = _argument_meanings(inspect.getdoc(function) or "")
    parameters = [each for each in inspect.signature(function).parameters.values() if each.name not in GIVEN]
    return [FunctionOption(each.name, each.default, meanings.get(each.name, "")) for each in parameters]


def _argument_meanings(docstring: str) -> dict[str, str]:
    _, _, arguments = docstring.partition("\nArgs:\n")
    arguments = re.split(r"\n\n|\n\w+:\n", arguments)[0]
    entries = re.findall(r"^    (\w+): (.*(?:\n     .*)*)", arguments, re.M)
    return {name: meaning[:1].upper() + " ".join(meaning[1:].split()) for name, meaning in entries}
