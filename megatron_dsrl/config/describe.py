"""What fields of sections accept, described for `dsrl config` and the reference page; all derived from the classes'
annotations."""

import difflib
import inspect
import json
import types
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from megatron_dsrl.common.errors import UserError
from megatron_dsrl.config.registry import FunctionName, Options, Registry
from megatron_dsrl.config.section import Section

_SIMPLE = {int: "integer", float: "number", str: "string", bool: "true or false", Any: "anything"}
_PLURAL = {int: "integers", float: "numbers", str: "strings", bool: "true or false"}
_LIMITS = {
    annotated_types.Ge: ("ge", "at least"),
    annotated_types.Gt: ("gt", "above"),
    annotated_types.Le: ("le", "at most"),
    annotated_types.Lt: ("lt", "below"),
}


def members(annotation: Any) -> list[Any]:
    """The alternatives of an annotation, without Annotated and None."""
    if get_origin(annotation) is Annotated:
        return members(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return [member for part in get_args(annotation) for member in members(part)]
    return [] if annotation is type(None) else [annotation]


def is_section(annotation: Any) -> bool:
    """Whether it is a section's class."""
    return isinstance(annotation, type) and issubclass(annotation, Section)


def tags(section: type[Section]) -> tuple[Any, ...]:
    """Values of the `name` that tells this section from the others of its union; none if any name is valid."""
    field = section.model_fields.get("name")
    return get_args(field.annotation) if field else ()


def registry_of(field: FieldInfo) -> Registry | None:
    """The registry that a field's value is chosen from."""
    return _metadata_of(field, Registry)


def item_registry_of(field: FieldInfo) -> Registry | None:
    """The registry that the items of a list are chosen from."""
    for member in members(field.annotation):
        if get_origin(member) is list:
            metadata = getattr(get_args(member)[0], "__metadata__", ())
            return next((item for item in metadata if isinstance(item, Registry)), None)
    return None


def choices_of(field: FieldInfo) -> Registry | None:
    """The registry that a field's value, or each of its items, is chosen from."""
    return registry_of(field) or item_registry_of(field)


def function_of(field: FieldInfo) -> FunctionName | None:
    """The kind of function that a field names."""
    return _metadata_of(field, FunctionName)


def sections_of(field: FieldInfo) -> list[type[Section]]:
    """The classes of sections that a field may hold, by itself or as items: one, or one per choice."""
    registry = choices_of(field)
    if registry is not None:
        return list(registry.classes())
    return [section for member in members(field.annotation) for section in _sections_in(member)]


def _sections_in(member: Any) -> list[type[Section]]:
    if is_section(member):
        return [member]
    if get_origin(member) in (list, tuple, dict):
        return [section for inner in members(get_args(member)[-1]) for section in _sections_in(inner)]
    return []


def _metadata_of(field: FieldInfo, kind: type) -> Any:
    # Pydantic keeps the union of `Annotated[Options, registry] | None`; in a list the items are chosen, not the field.
    of_union = get_args(field.annotation) if get_origin(field.annotation) in (Union, types.UnionType) else ()
    metadata = [*field.metadata, *(item for part in of_union for item in getattr(part, "__metadata__", ()))]
    return next((item for item in metadata if isinstance(item, kind)), None)


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
    Raises UserError, which names the nearest key, if it does not exist.

    Args:
        root: the class of the whole configuration.
        path: such as `rollout.top_p`, `phases.0.loss`, `phases.loss.gspo` or `phases.loss.clip_high`.
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
    sections = [(section, len(place.sections) > 1) for place in places for section in place.sections]
    here = {str(tag) for section, is_choice in sections for tag in tags(section)[:1] if is_choice}
    here |= {name for section, _ in sections for name in section.model_fields}
    if nearest := did_you_mean(part, here):
        return nearest
    everywhere = {path: path.rpartition(".")[2] for path in _field_paths(root)}
    if nearest_name := difflib.get_close_matches(part, everywhere.values(), n=1):
        paths = [path for path, name in everywhere.items() if name == nearest_name[0]]
        return f"; did you mean {' or '.join(paths if part in nearest_name else paths[:1])}?"
    return f"; valid keys are {', '.join(sorted(here))}" if here else "; it is a single value"


def did_you_mean(name: str, valid: Iterable[str]) -> str:
    """The end of a message with the nearest valid name; empty if none is near."""
    nearest = difflib.get_close_matches(name, list(valid), n=1)
    return f"; did you mean {nearest[0]}?" if nearest else ""


def _field_paths(section: type[Section], prefix: str = "") -> list[str]:
    """Dotted paths of all fields below a section, without positions in lists and options of choices."""
    paths = []
    for name, field in section.model_fields.items():
        paths.append(f"{prefix}{name}")
        if choices_of(field) is None and len(sections_of(field)) == 1:
            paths += _field_paths(sections_of(field)[0], f"{prefix}{name}.")
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
    """The default as it would be written in YAML; None if the field is required. `section` for a section."""
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
    for part in get_args(field.annotation):  # also of `Annotated[int, Field(ge=1)] | None`
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
        return _one_line_each(place.field.description)
    return documentation(place.sections[0]) if place.sections else ""


def documentation(described: type[Section] | Callable[..., Any]) -> str:
    """The docstring of a section's class or of a function: paragraphs, each on one line."""
    return _one_line_each(inspect.cleandoc(described.__doc__ or ""))


def _one_line_each(text: str) -> str:
    return "\n\n".join(" ".join(paragraph.split("\n")) for paragraph in text.split("\n\n"))
