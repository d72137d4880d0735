"""The base of every configuration section: typed, immutable, and strict about its keys; and custom sections, classes
and functions, by their dotted paths `package.module:name`."""

import importlib
import json
import os.path
import re
import traceback
from typing import Annotated, Any, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import InitErrorDetails, PydanticCustomError, core_schema

FolderPath = Annotated[str, AfterValidator(os.path.expanduser)]
"""A field with the path of a folder; a `~` at its beginning is the user's home."""


def _server_url(url: str) -> str:
    if "@" in url:
        raise ValueError(
            "expected http://host:port without a user name and password; the key of an engine (--api-key) is read from "
            "the environment variable DSRL_ENGINE_API_KEY"
        )
    if not re.fullmatch(r"https?://[^/\s?#]+/?", url):
        raise ValueError("expected http://host:port, without a path")
    return url.removesuffix("/")


ServerUrl = Annotated[str, AfterValidator(_server_url)]
"""A field with the address of an SGLang server, `http://host:port`."""


class Section(BaseModel):
    """A configuration section.

    Unknown keys are refused, values are never coerced from another type (`"3"` is not an integer), and a section cannot
    change after it was built. The docstring under a field is its documentation.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)

    def with_fields(self, section: str, **fields: Any) -> Self:
        """A copy in which these fields of one of its sections have other values, which are not checked."""
        return self.model_copy(update={section: getattr(self, section).model_copy(update=fields)})


SectionClass = TypeVar("SectionClass", bound=Section)

BY_OWN_CLASS = core_schema.plain_serializer_function_ser_schema(
    lambda section, info: section.model_dump(mode=info.mode), info_arg=True
)
"""Writes a section out with the fields of its own class, not of the class that a field is annotated with."""

DOTTED_PATH = r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$"
"""A dotted path, for JSON schemas."""


def object_at(path: str) -> Any:
    """Import what a dotted path `package.module:name` names; None if the module does not have it. Raises ValueError if
    the module cannot be imported, or the path is a file's."""
    module_name, _, name = path.partition(":")
    if "/" in module_name or module_name.endswith(".py"):
        dotted = module_name.removeprefix("./").removesuffix(".py").replace("/", ".")
        raise ValueError(f"`{module_name}` is a file's path; write it with dots: `{dotted}:{name}`")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(
            f"cannot import `{module_name}` ({error}); run where it is found, or add its folder to PYTHONPATH"
        ) from error
    except (Exception, SystemExit) as error:  # anything that a module may do while it is imported
        last = traceback.extract_tb(error.__traceback__)[-1]
        place = "" if isinstance(error, SyntaxError) else f" ({last.filename}, line {last.lineno})"
        raise ValueError(f"cannot import `{module_name}`: {type(error).__name__}: {error}{place}") from error
    return getattr(module, name, None)


def class_at(path: str, kind: str, base: type[SectionClass], key: str = "name") -> type[SectionClass]:
    """Import the class. Raises ValidationError if the module or class does not exist, or the class is not a subclass of
    `base`.

    Args:
        path: `package.module:Class`.
        kind: what it is, for messages.
        base: what it must be a subclass of.
        key: name of the field that holds the path, for messages.
    """
    try:
        found = object_at(path)
    except ValueError as error:
        raise _wrong_path(str(error), path, key) from error
    if not (isinstance(found, type) and issubclass(found, base)):
        module_name, _, class_name = path.partition(":")
        message = f"`{module_name}` has no {kind} `{class_name}`, which must be a subclass of {base.__name__}"
        raise _wrong_path(message, path, key)
    return found


def _wrong_path(message: str, path: Any, key: str) -> ValidationError:
    error = PydanticCustomError("dotted_path", "{message}", {"message": message, "key": key})
    return ValidationError.from_exception_data("dotted path", [InitErrorDetails(type=error, input=path)])


class CustomSection:
    """Put it into a field's `Annotated`: the section may name a subclass by the dotted path in its `type`, as in

        phases:
          - type: "my_package.my_module:MyPhase"

    Its fields, including those it adds, are then checked, explained and written out like any section's.
    """

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
            self._validate, handler(source), serialization=BY_OWN_CLASS
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
            "properties": described["properties"] | {"type": path | {"type": "string", "pattern": DOTTED_PATH}},
            "required": [*described.get("required", []), "type"],
        }
        described["properties"]["type"] = path | {"type": "null"}
        return {"anyOf": [base, own]}
