"""From plain data to a section of the configuration, with one message that names every wrong field: its path, what was
wrong, the value, and what was meant."""

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any, get_args, get_origin

from pydantic import ValidationError

from megatron_dsrl.common.errors import UserError
from megatron_dsrl.common.numbers import counted
from megatron_dsrl.config.describe import did_you_mean, is_section, members, registry_of, tags
from megatron_dsrl.config.registry import Registry
from megatron_dsrl.config.section import DOTTED_PATH, CustomSection, Section, SectionClass
from megatron_dsrl.config.yaml_text import KeyPath

_TYPE_NAMES = {
    "int_type": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "string_type": "a string",
    "bool_type": "true or false",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "a section (`key: value` lines)",
    "model_type": "a section (`key: value` lines)",
    "model_attributes_type": "a section (`key: value` lines)",
}


def validated(
    section: type[SectionClass], data: Any, places: Mapping[KeyPath, str], source: str, what: str = "configuration"
) -> SectionClass:
    """Check plain data, as read from YAML, against a section's class. Raises UserError if a field is unknown, missing,
    or has a wrong value; every one is named, with its place.

    Args:
        places: where the value of a key path was set, such as `run.yaml:3`; a path that it lacks takes the place of its
            nearest parent.
        source: the file or command that the data comes from, for the message.
        what: what the data is, for the message.
    """
    problems = [
        f"  {'.'.join(map(str, path))}: {problem}{_in_brackets(path, places)}" for path, problem in _not_json(data, ())
    ]
    if not problems:
        try:
            # JSON mode: a YAML list may stand for a tuple there, while every type stays strict.
            return section.model_validate_json(json.dumps(data, allow_nan=False))
        except ValidationError as error:
            problems = [f"  {problem}" for problem in _explain(error, section, data, places)]
    raise UserError("\n".join([f"{source}: {counted(len(problems), 'problem')} in the {what}", *problems]))


def _not_json(value: Any, path: KeyPath) -> Iterator[tuple[KeyPath, str]]:
    """Values that YAML can write but a configuration cannot hold: infinities, NaN, binary, sets, non-string keys."""
    if isinstance(value, dict):
        for key, item in value.items():
            if isinstance(key, str):
                yield from _not_json(item, (*path, key))
            else:
                yield (*path, str(key)), f'a key must be a string; write "{key}" in quotes if this one is meant'
    elif isinstance(value, list):
        for position, item in enumerate(value):
            yield from _not_json(item, (*path, position))
    elif isinstance(value, float) and not math.isfinite(value):
        yield path, f"expected a finite number, got {value}"
    elif not isinstance(value, str | int | float | None):
        yield path, f"cannot hold a {type(value).__name__}"


def _explain(error: ValidationError, root: type[Section], data: Any, places: Mapping[KeyPath, str]) -> list[str]:
    """One line per wrong field, in the order of the sections."""
    problems: dict[KeyPath, list[str]] = {}
    hints: dict[KeyPath, str] = {}
    for detail in error.errors(include_url=False):
        path, owner = _walk(root, detail["loc"], data)
        if detail["type"] in ("union_tag_invalid", "dotted_path") and isinstance(_value_at(data, path), dict):
            path = (*path, detail["ctx"].get("key", "name"))
        what, hints[path] = _describe(detail, path, owner, root)
        if what not in problems.setdefault(path, []):
            problems[path].append(what)
    lines = []
    for path, whats in problems.items():
        what = " or ".join(whats).replace(" or expected", " or")
        given = _given(path, what, data)
        lines.append(f"{'.'.join(map(str, path))}: {what}{given}{hints[path]}{_in_brackets(path, places)}")
    return lines


def _given(path: KeyPath, what: str, data: Any) -> str:
    """The value, if it is informative: not for a wrong or missing key, and not for a whole section."""
    if what.startswith(("unknown key", "missing")):
        return ""
    value = _value_at(data, path)
    text = repr(value)
    return "" if isinstance(value, dict) and value else f", got {text if len(text) <= 80 else text[:77] + '...'}"


def _in_brackets(path: KeyPath, places: Mapping[KeyPath, str]) -> str:
    """Where the value of a key path, or else its nearest parent, was set: ` (run.yaml:3)`; empty when unknown."""
    place = next((places[path[:length]] for length in range(len(path), 0, -1) if path[:length] in places), None)
    return f" ({place})" if place else ""


def _walk(root: type[Section], location: tuple[str | int, ...], data: Any) -> tuple[KeyPath, type[Section] | None]:
    """The data path of a pydantic location, and the section class that holds its last key (None inside a dict).

    Pydantic locates a value by a mixture of data keys and schema parts: the tag of a union's member, the type that was
    tried. This follows the mixture through the section classes, so that messages show the path a user wrote and the
    names valid there. `data` decides where a section's class is chosen by name (registry.py) or by `type` (section.py).
    """
    path: KeyPath = ()
    owner: type[Section] | None = root
    annotation: Any = root
    for part in location:
        alternatives = members(annotation)
        sections = [member for member in alternatives if is_section(member)]
        tagged = [section for section in sections if part in tags(section)]
        if len(sections) > 1 and tagged:
            annotation = tagged[0]
        elif len(sections) == 1:
            owner = sections[0]
            path = (*path, part)
            field = owner.model_fields.get(str(part))
            registry = registry_of(field) if field else None
            if registry:
                annotation = registry.options_class(_value_at(data, path))
            else:
                annotation = field.annotation if field else Any
        elif containers := [member for member in alternatives if _has_key(member, part)]:
            owner = None if get_origin(containers[0]) is dict else owner
            path = (*path, part)
            annotation = get_args(containers[0])[-1]
            for item in getattr(annotation, "__metadata__", ()):
                if isinstance(item, CustomSection):
                    annotation = item.section_class(_value_at(data, path))
                elif isinstance(item, Registry):
                    annotation = item.options_class(_value_at(data, path))
        # Otherwise the part names the member of a union of plain types that was tried: no key of the data.
    return path, owner


def _has_key(annotation: Any, part: str | int) -> bool:
    """Whether the part can be a key or position of a value of this type."""
    origin = get_origin(annotation)
    return origin is dict or (origin in (list, tuple) and isinstance(part, int))


def _describe(
    detail: Mapping[str, Any], path: KeyPath, owner: type[Section] | None, root: type[Section]
) -> tuple[str, str]:
    """Description of the mistake, and a hint at what was meant; the caller puts the value between them."""
    context = detail.get("ctx", {})
    match detail["type"]:
        case "extra_forbidden":
            return "unknown key", _suggest_key(str(path[-1]), owner, root)
        case "missing":
            return "missing", "; it has no default"
        case "union_tag_invalid":
            valid = _split_choices(context["expected_tags"])
            return "unknown name", f"{did_you_mean(context['tag'], valid)}; valid names are {', '.join(valid)}"
        case "union_tag_not_found":
            return "needs a `name` that says which kind it is", ""
        case "too_short":
            return f"expected at least {context['min_length']} items" if context["min_length"] > 1 else "is empty", ""
        case "string_pattern_mismatch" if context["pattern"] == DOTTED_PATH:
            return "expected a dotted path `package.module:name`", ""
        case "literal_error":
            meant = did_you_mean(str(detail["input"]), _split_choices(context["expected"]))
            return f"expected {context['expected']}", meant
        case "value_error":
            return str(context["error"]), ""
        case kind if kind in _TYPE_NAMES:
            return f"expected {_TYPE_NAMES[kind]}", ""
        case _:
            return detail["msg"].replace("Input should be", "expected"), ""


def _split_choices(text: str) -> list[str]:
    """Pydantic's `'a', 'b' or 'c'` as a list of names."""
    return [choice.strip(" '") for choice in text.replace(" or ", ",").split(",")]


def _suggest_key(name: str, owner: type[Section] | None, root: type[Section]) -> str:
    """The nearest valid key of the same section, else all of them and where else in the tree the key exists."""
    if owner is None:
        return ""
    if nearest := did_you_mean(name, owner.model_fields):
        return nearest
    elsewhere = [path for path in _all_field_paths(root, "") if path.rpartition(".")[2] == name]
    valid = "" if elsewhere and owner is root else f"; valid names are {', '.join(owner.model_fields)}"
    return valid + (f"; did you mean {' or '.join(elsewhere)}?" if elsewhere else "")


def _all_field_paths(section: type[Section], prefix: str) -> Iterator[str]:
    """Dotted paths of every field under a section that a YAML file could name without a list position."""
    for name, field in section.model_fields.items():
        yield f"{prefix}{name}"
        for member in members(field.annotation):
            if is_section(member):
                yield from _all_field_paths(member, f"{prefix}{name}.")


def _value_at(data: Any, path: KeyPath) -> Any:
    for part in path:
        is_item = isinstance(data, list) and isinstance(part, int)
        data = data[part] if is_item or isinstance(data, dict) else None
    return data
