"""The values that fields of sections accept, derived from their annotations."""

import types
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from megatron_dsrl.config.function_name import FunctionName
from megatron_dsrl.config.registry import Registry
from megatron_dsrl.config.section import Section


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
    """Values of the `name` that tells this section from the others of its union; none for a name of any text."""
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
    # Of `Annotated[Options, registry] | None` pydantic leaves the union; in a list the items are chosen, not the field.
    of_union = get_args(field.annotation) if get_origin(field.annotation) in (Union, types.UnionType) else ()
    metadata = [item for part in (field, *of_union) for item in _metadata(part)]
    return next((item for item in metadata if isinstance(item, kind)), None)


def _metadata(part: Any) -> tuple[Any, ...]:
    return tuple(getattr(part, "metadata", getattr(part, "__metadata__", ())))
