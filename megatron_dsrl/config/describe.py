"""Descriptions of the configuration's fields, derived from the classes, for `dsrl config` and the reference page."""

import difflib
import inspect
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

import annotated_types
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from megatron_dsrl.common.errors import UserError
from megatron_dsrl.config.fields import (
    choices_of,
    function_of,
    is_section,
    item_registry_of,
    members,
    registry_of,
    sections_of,
    tags,
)
from megatron_dsrl.config.registry import Options
from megatron_dsrl.config.section import Section

_SIMPLE = {int: "integer", float: "number", str: "string", bool: "true or false", Any: "anything"}
_PLURAL = {int: "integers", float: "numbers", str: "strings", bool: "true or false"}
_LIMITS = {
    annotated_types.Ge: ("ge", "at least"),
    annotated_types.Gt: ("gt", "above"),
    annotated_types.Le: ("le", "at most"),
    annotated_types.Lt: ("lt", "below"),
}


@dataclass(frozen=True)
class Place:
    """A section or one of its fields, and where it is in the configuration."""

    path: str
    section: type[Section]
    """The section itself, or the one that has the field."""
    field: FieldInfo | None = None

    @property
    def sections(self) -> list[type[Section]]:
        """The sections below: the section itself, or those that the field may hold."""
        return [self.section] if self.field is None else sections_of(self.field)


def find(root: type[Section], path: str) -> list[Place]:
    """Find what a dotted path names. Positions in lists may be left out; an option may belong to several choices.

    Args:
        root: the class of the whole configuration.
        path: such as `rollout.top_p`, `phases.0.loss`, `phases.loss.gspo` or `phases.loss.clip_high`.

    Raises:
        UserError: the key does not exist; names the nearest one.
    """
    places = [Place("", root)]
    for part in path.split("."):
        below = [found for place in places for found in _below(place, part)]
        if not below:
            raise UserError(f"{path}: unknown key `{part}`{_suggestion(part, places, root)}")
        places = below
    return places


def _below(place: Place, part: str) -> list[Place]:
    containers = [] if place.field is None else [get_origin(member) for member in members(place.field.annotation)]
    if part.isdecimal() and list in containers:
        return [place]
    found = []
    for section in place.sections:
        choice = tags(section)[:1] if len(place.sections) > 1 else ()
        if part in choice:
            found.append(Place(f"{place.path}.{part}", section))
        elif part in section.model_fields:
            prefix = ".".join(map(str, filter(None, (place.path, *choice))))
            found.append(Place(f"{prefix}.{part}".lstrip("."), section, section.model_fields[part]))
    # A key of a mapping, such as a run's name in a sweep.
    return found or ([place] if dict in containers and part.isidentifier() else [])


def _suggestion(part: str, places: Sequence[Place], root: type[Section]) -> str:
    here = {str(name) for place in places for name in names_below(place)}
    nearest = difflib.get_close_matches(part, here, n=1)
    if nearest:
        return f"; did you mean {nearest[0]}?"
    elsewhere = [path for path in field_paths(root) if path.rpartition(".")[2] == part]
    if elsewhere:
        return f"; did you mean {' or '.join(elsewhere)}?"
    everywhere = {path.rpartition(".")[2]: path for path in reversed(field_paths(root))}
    nearest = difflib.get_close_matches(part, everywhere, n=1)
    if nearest:
        return f"; did you mean {everywhere[nearest[0]]}?"
    return f"; there are {', '.join(sorted(here))}" if here else "; it is a single value"


def names_below(place: Place) -> list[str]:
    """Names of choices and fields that may follow the place's path."""
    choices = [str(tag) for section in place.sections for tag in tags(section)[:1] if len(place.sections) > 1]
    fields = [name for section in place.sections for name in section.model_fields]
    return list(dict.fromkeys((*choices, *fields)))


def field_paths(section: type[Section], prefix: str = "") -> list[str]:
    """Dotted paths of all fields below a section, without positions in lists and options of choices."""
    paths = []
    for name, field in section.model_fields.items():
        paths.append(f"{prefix}{name}")
        if choices_of(field) is None and len(sections_of(field)) == 1:
            paths += field_paths(sections_of(field)[0], f"{prefix}{name}.")
    return paths


def type_of(field: FieldInfo) -> str:
    """Description of the values a field accepts."""
    registry, function = registry_of(field), function_of(field)
    if registry is not None:
        kind = f"{_article(registry.kind)}, or the dotted path of your own"
    elif (items := item_registry_of(field)) is not None:
        kind = f"list of {items.kind}s, or dotted paths of your own"
    elif function is not None:
        kind = f"name of {_article(function.kind)}, or the dotted path of your own"
    else:
        kind = " or ".join(dict.fromkeys(_in_words(member) for member in members(field.annotation)))
    optional = type(None) in get_args(field.annotation)
    return f"{kind}, or null" if optional else kind


def _in_words(annotation: Any) -> str:
    if annotation in _SIMPLE:
        return _SIMPLE[annotation]
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}" if len(arguments) > 1 else str(arguments[0])
    if origin is tuple:
        return f"list of {len(arguments)} {_PLURAL[arguments[0]]}"
    if origin is list:
        inner = members(arguments[0])[0]
        return f"list of {_PLURAL.get(inner, 'sections')}"
    if origin is dict:
        values = members(arguments[1])
        return "mapping of names to sections" if any(map(is_section, values)) else "mapping"
    return "section"


def _article(kind: str) -> str:
    return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"


def default_of(field: FieldInfo) -> str | None:
    """The default as it would be written in YAML; None where the field is required. `section` for a section's."""
    value = field.get_default(call_default_factory=True, validated_data={})
    if value is PydanticUndefined:
        return None
    if isinstance(value, Options):
        return value.name
    if isinstance(value, Section):
        return "section"
    if isinstance(value, str):
        return value if value.isprintable() and value else json.dumps(value)
    return json.dumps(value)


def limits_of(field: FieldInfo) -> str:
    """Description of a value's limits apart from its type; empty if it has none."""
    metadata = list(field.metadata)
    for part in get_args(field.annotation):  # of `Annotated[int, Field(ge=1)] | None` too
        metadata += getattr(part, "__metadata__", ())
    words = []
    for limit in metadata:
        for kind, (attribute, word) in _LIMITS.items():
            if isinstance(limit, kind):
                words.append(f"{word} {getattr(limit, attribute)}")
        if isinstance(limit, annotated_types.MinLen):
            words.append("not empty" if limit.min_length == 1 else f"at least {limit.min_length} items")
        if getattr(limit, "pattern", None):
            words.append(f"matches `{limit.pattern}`")
    return " and ".join(words)


def meaning_of(place: Place) -> str:
    """Purpose of the field or section."""
    if place.field is not None and place.field.description:
        return one_line_each(place.field.description)
    return documentation(place.sections[0]) if place.sections else ""


def documentation(section: type[Section]) -> str:
    """The docstring of a section's class: paragraphs, each on one line."""
    return one_line_each(inspect.cleandoc(section.__doc__ or ""))


def one_line_each(text: str) -> str:
    """Paragraphs of a docstring, each on one line."""
    return "\n\n".join(" ".join(paragraph.split("\n")) for paragraph in text.split("\n\n"))
