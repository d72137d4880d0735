"""Sections that may be of a custom class.

    phases: list[Annotated[PhaseConfig, CustomSection("phase", PhaseConfig)]]

is a list of PhaseConfig sections, each of which may name a subclass by the dotted path in its `type`:

    phases:
      - type: "my_package.my_module:MyPhase"

Its fields, those that it adds to the others included, are then checked, explained and written out like every section's.
"""

import json
from typing import Any

from pydantic import (
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    SerializationInfo,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import core_schema

from megatron_dsrl.config.dotted_path import PATTERN, class_at
from megatron_dsrl.config.section import Section


class CustomSection:
    """In a field's `Annotated`: the section may name a custom subclass."""

    def __init__(self, kind: str, base: type[Section]) -> None:
        """
        Args:
            kind: what the section describes, for messages.
            base: its class if no other is named; has a field `type`.
        """
        self._kind = kind
        self._base = base

    def section_class(self, value: Any) -> type[Section]:
        """The class that checks a value; the base if the class it names cannot be used."""
        try:
            return self._named(value)
        except ValidationError:
            return self._base

    def _named(self, value: Any) -> type[Section]:
        path = value.get("type") if isinstance(value, dict) else None
        return class_at(path, self._kind, self._base, key="type") if isinstance(path, str) else self._base

    def _validate(self, value: Any, validate: ValidatorFunctionWrapHandler, info: ValidationInfo) -> Any:
        named = self._named(value)
        if named is self._base:
            return validate(value)
        if info.mode == "json":  # where tuples are written as lists
            return named.model_validate_json(json.dumps(value))
        return named.model_validate(value)

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.with_info_wrap_validator_function(
            self._validate,
            handler(source),
            serialization=core_schema.plain_serializer_function_ser_schema(_dump, info_arg=True),
        )

    def __get_pydantic_json_schema__(
        self, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        """The section, or one with a dotted path in its `type` and the fields of that class."""
        base = handler(schema)
        described = handler.resolve_ref_schema(base)
        path = {key: value for key, value in described["properties"]["type"].items() if key != "anyOf"}
        own = {
            "title": f"Your own {self._kind}",
            "type": "object",
            "properties": described["properties"] | {"type": path | {"type": "string", "pattern": PATTERN}},
            "required": [*described.get("required", []), "type"],
        }
        described["properties"]["type"] = path | {"type": "null"}
        return {"anyOf": [base, own]}


def _dump(section: Section, info: SerializationInfo) -> dict[str, Any]:
    return section.model_dump(mode=info.mode)
