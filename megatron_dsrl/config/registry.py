"""Named choices with their own options, such as advantages and losses, and functions that a configuration names.

What can be chosen is an options class. Built-in ones are registered under the value of their `name`:

    @ADVANTAGES.register
    class LeaveOneOut(AdvantageOptions):
        name: Literal["leave_one_out"] = "leave_one_out"

and a section has a field of that kind:

    advantage: Annotated[Options, ADVANTAGES]

In YAML the value is `{name: leave_one_out}` with the options beside the name, or the bare name. Any other class is
named by its dotted path, `{name: "my_package.my_module:MyAdvantage", threshold: 0.5}`; it need not be registered.
Options are typed and checked like every other section.

The classes live where they compute, above this package; the modules of the built-in ones are imported by name when
something is looked up for the first time.
"""

import importlib
import inspect
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import Any, TypeVar

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler, ValidationError
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import InitErrorDetails, core_schema

from megatron_dsrl.config.section import BY_OWN_CLASS, DOTTED_PATH, Section, class_at

GIVEN = ("response", "answer", "prompt")
"""Arguments that every caller passes; the others are options."""


class Options(Section):
    """A choice and its options."""

    name: str = ""
    """Which one: a registered name, or the dotted path `package.module:Class` of your own."""

    @classmethod
    def __get_pydantic_json_schema__(
        cls, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        described = handler(schema)
        # Its default is for code; in a file the name says which choice this is.
        handler.resolve_ref_schema(described)["required"] = ["name"]
        return described


OptionsClass = TypeVar("OptionsClass", bound=Options)


class Registry:
    """The choices for fields of one kind. Put an instance into a field's `Annotated` to use it."""

    def __init__(self, kind: str, modules: Sequence[str]) -> None:
        """
        Args:
            kind: what is chosen, for messages.
            modules: where the built-in classes are, all with one base class; imported when something is looked up.
        """
        self.kind = kind
        self._modules = tuple(modules)
        self._classes: dict[str, type[Options]] = {}

    def register(self, options_class: type[OptionsClass]) -> type[OptionsClass]:
        """Decorator: make the class available under the default of its `name`."""
        name = options_class.model_fields["name"].default
        assert name and name not in self._classes, f"{self.kind} {name!r} is registered twice, or has no name"
        self._classes[name] = options_class
        return options_class

    def names(self) -> list[str]:
        """The registered names, ordered by module and then by definition. The order of imports does not matter."""
        for module in self._modules:
            importlib.import_module(module)
        place = {module: position for position, module in enumerate(self._modules)}
        return sorted(self._classes, key=lambda name: place.get(self._classes[name].__module__, len(place)))

    def classes(self) -> list[type[Options]]:
        return [self._classes[name] for name in self.names()]

    def options_class(self, value: Any) -> type[Options] | None:
        """The class that a value names; None if it names none."""
        try:
            return self._named(value)
        except ValidationError:
            return None

    def build(self, value: Any) -> Any:
        """Options from a bare name, a mapping with a `name`, or options (typed Any: the class depends on the registry).
        Raises ValidationError if the name, the class or an option does not exist, or an option is ill-typed."""
        if isinstance(value, Options):
            return value
        # JSON mode: a list may stand for a tuple.
        return self._named(value).model_validate_json(json.dumps(_as_mapping(value)))

    def _named(self, value: Any) -> type[Options]:
        name = _as_mapping(value).get("name")
        if not isinstance(name, str) or not name:
            raise _error("union_tag_not_found", value, {"discriminator": "'name'"})
        names = self.names()
        if ":" in name:
            base = self._classes[names[0]].__base__
            assert base is not None and issubclass(base, Options)
            return class_at(name, self.kind, base)
        if name not in names:
            context = {"discriminator": "'name'", "tag": name, "expected_tags": ", ".join(map(repr, names))}
            raise _error("union_tag_invalid", value, context)
        return self._classes[name]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(self.build, serialization=BY_OWN_CLASS)

    def __get_pydantic_json_schema__(
        self, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        """One of the registered classes by its `name`, a bare name, or your own class by its dotted path."""
        bare = {"type": "string", "anyOf": [{"enum": self.names()}, {"pattern": DOTTED_PATH}]}
        own = {
            "title": f"Your own {self.kind}",
            "type": "object",
            "properties": {"name": {"type": "string", "pattern": DOTTED_PATH}},
            "required": ["name"],
        }
        registered = handler(core_schema.union_schema([each.__pydantic_core_schema__ for each in self.classes()]))
        return {"oneOf": [bare, *registered["anyOf"], own]}


def _as_mapping(value: Any) -> dict[str, Any]:
    """The bare name is short for a mapping with nothing else."""
    if isinstance(value, str):
        return {"name": value}
    return value if isinstance(value, dict) else {}


def _error(kind: str, value: Any, context: dict[str, Any]) -> ValidationError:
    return ValidationError.from_exception_data("options", [InitErrorDetails(type=kind, input=value, ctx=context)])


@dataclass(frozen=True)
class FunctionOption:
    """A keyword argument of a function."""

    name: str
    default: Any
    """`inspect.Parameter.empty` if it is required."""
    meaning: str


class FunctionName:
    """Put it into the `Annotated` of a text field that names a function, built-in by name or custom by its dotted path.
    For documentation; the function is looked up, and a wrong name refused, where it is used."""

    def __init__(self, kind: str, table: str) -> None:
        """
        Args:
            kind: what the function is.
            table: dotted path of a mapping from the built-in names to objects whose `function` is a dotted path;
                imported on first use.
        """
        self.kind = kind
        self._table = table

    def functions(self) -> dict[str, Callable[..., Any]]:
        """The built-in functions by their names."""
        return {name: resolve_name(entry.function) for name, entry in resolve_name(self._table).items()}

    def __get_pydantic_json_schema__(
        self, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        described: dict[str, Any] = handler(schema)
        return described | {"anyOf": [{"enum": list(resolve_name(self._table))}, {"pattern": DOTTED_PATH}]}


def options_of(function: Callable[..., Any]) -> list[FunctionOption]:
    """What a configuration may set of a function, with the meaning from the `Args:` of its docstring (Google style)."""
    _, _, arguments = (inspect.getdoc(function) or "").partition("\nArgs:\n")
    arguments = re.split(r"\n\n|\n\w+:\n", arguments)[0]
    entries = re.findall(r"^    (\w+): (.*(?:\n     .*)*)", arguments, re.M)
    meanings = {name: text[:1].upper() + " ".join(text[1:].split()) for name, text in entries}
    parameters = [each for each in inspect.signature(function).parameters.values() if each.name not in GIVEN]
    return [FunctionOption(each.name, each.default, meanings.get(each.name, "")) for each in parameters]
