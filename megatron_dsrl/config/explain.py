"""Words for a configuration that does not validate: which field, what was wrong, the value, what was meant.

Pydantic's errors locate a value by a mixture of data keys and schema parts (the tag of a union's member, the type that
was tried). `_walk` follows that mixture through the section classes, so that messages show the path a user wrote, and
so that the valid names at that place are known.
"""

import difflib
from collections.abc import Iterator, Mapping
from typing import Any, get_args, get_origin

from pydantic import ValidationError

from megatron_dsrl.config.custom_section import CustomSection
from megatron_dsrl.config.dotted_path import PATTERN as DOTTED_PATH
from megatron_dsrl.config.fields import is_section, members, registry_of, tags
from megatron_dsrl.config.registry import Registry
from megatron_dsrl.config.section import Section
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


def explain_validation_error(
    error: ValidationError, root: type[Section], data: Any, places: Mapping[KeyPath, str]
) -> list[str]:
    """One line per wrong field, in the order of the sections.

    Args:
        root: the class that `data` was validated by.
        data: plain data, as read from YAML.
        places: where the value of a key path was set; a path that it lacks takes the place of its nearest parent.
    """
    problems: dict[KeyPath, list[str]] = {}
    hints: dict[KeyPath, str] = {}
    for detail in error.errors(include_url=False):
        path, owner = _walk(root, detail["loc"], data)
        if detail["type"] in ("union_tag_invalid", "dotted_path") and isinstance(_value_at(data, path), dict):
            path = (*path, detail["ctx"].get("key", "name"))
        what, hints[path] = _describe(detail, path, owner, root)
        if what not in problems.setdefault(path, []):
            problems[path].append(what)
    return [
        _line(path, " or ".join(whats).replace(" or expected", " or"), hints[path], data, places)
        for path, whats in problems.items()
    ]


def _line(path: KeyPath, what: str, hint: str, data: Any, places: Mapping[KeyPath, str]) -> str:
    return f"{'.'.join(map(str, path))}: {what}{_given(path, what, data)}{hint}{in_brackets(path, places)}"


def _given(path: KeyPath, what: str, data: Any) -> str:
    """The value, where that says something: not for a key as such, and not a whole section."""
    if what.startswith(("unknown key", "missing")):
        return ""
    value = _value_at(data, path)
    return "" if isinstance(value, dict) and value else f", got {_shorten(value)}"


def in_brackets(path: KeyPath, places: Mapping[KeyPath, str]) -> str:
    """Where the value of a key path, or else its nearest parent, was set: ` (run.yaml:3)`; empty when unknown."""
    place = next((places[path[:length]] for length in range(len(path), 0, -1) if path[:length] in places), None)
    return f" ({place})" if place else ""


def _walk(root: type[Section], location: tuple[str | int, ...], data: Any) -> tuple[KeyPath, type[Section] | None]:
    """The data path of a pydantic location, and the section class that holds its last key (None inside a dict).

    `data` decides where a section's class is chosen by name (`config/registry.py`) or by `type`
    (`config/custom_section.py`).
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
            return "unknown key", suggest_key(str(path[-1]), owner, root)
        case "missing":
            return "missing", "; it has no default"
        case "union_tag_invalid":
            return "unknown name", _suggest_name(context["tag"], _split_choices(context["expected_tags"]))
        case "union_tag_not_found":
            return "needs a `name` that says which kind it is", ""
        case "too_short":
            return f"expected at least {context['min_length']} items" if context["min_length"] > 1 else "is empty", ""
        case "string_pattern_mismatch" if context["pattern"] == DOTTED_PATH:
            return "expected a dotted path `package.module:name`", ""
        case "literal_error":
            nearest = difflib.get_close_matches(str(detail["input"]), _split_choices(context["expected"]), n=1)
            return f"expected {context['expected']}", f"; did you mean {nearest[0]}?" if nearest else ""
        case "value_error":
            return str(context["error"]), ""
        case kind if kind in _TYPE_NAMES:
            return f"expected {_TYPE_NAMES[kind]}", ""
        case _:
            return detail["msg"].replace("Input should be", "expected"), ""


def _split_choices(text: str) -> list[str]:
    """Pydantic's `'a', 'b' or 'c'` as a list of names."""
    return [choice.strip(" '") for choice in text.replace(" or ", ",").split(",")]


def suggest_key(name: str, owner: type[Section] | None, root: type[Section]) -> str:
    """The nearest valid key of the same section, else all of them and where else in the tree the key exists."""
    if owner is None:
        return ""
    valid = list(owner.model_fields)
    elsewhere = [path for path in _all_field_paths(root, "") if path.rpartition(".")[2] == name]
    if difflib.get_close_matches(name, valid, n=1) or not elsewhere:
        return _suggest(name, valid)
    meant = f"; did you mean {' or '.join(elsewhere)}?"
    return meant if owner is root else f"{_suggest(name, valid)}{meant}"


def _suggest_name(name: str, valid: list[str]) -> str:
    """The nearest valid name, and all of them."""
    nearest = difflib.get_close_matches(str(name), valid, n=1)
    meant = f"; did you mean {nearest[0]}?" if nearest else ""
    return f"{meant}; valid names are {', '.join(valid)}"


def _suggest(name: str, valid: list[str]) -> str:
    nearest = difflib.get_close_matches(str(name), valid, n=1)
    return f"; did you mean {nearest[0]}?" if nearest else f"; valid names are {', '.join(valid)}"


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


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
