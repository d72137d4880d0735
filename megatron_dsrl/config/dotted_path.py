"""Custom classes and functions by their dotted paths `package.module:name`."""

import importlib
import traceback
from typing import Any, TypeVar

from pydantic import ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError

from megatron_dsrl.config.section import Section

SectionClass = TypeVar("SectionClass", bound=Section)

PATTERN = r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$"
"""A dotted path, for JSON schemas."""


def object_at(path: str) -> Any:
    """Import what a dotted path `package.module:name` names; None if the module has nothing of this name.

    Raises:
        ValueError: the module cannot be imported, or the path is a file's.
    """
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
        raise ValueError(f"cannot import `{module_name}`: {type(error).__name__}: {error}{_place(error)}") from error
    return getattr(module, name, None)


def _place(error: BaseException) -> str:
    """The line that raised an error, where it is not part of the message."""
    if isinstance(error, SyntaxError):
        return ""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f" ({last.filename}, line {last.lineno})"


def class_at(path: str, kind: str, base: type[SectionClass], key: str = "name") -> type[SectionClass]:
    """Import the class.

    Args:
        path: `package.module:Class`.
        kind: what it is, for messages.
        base: what it must be a subclass of.
        key: name of the field that holds the path, for messages.

    Raises:
        ValidationError: the module or class does not exist, or the class is not a subclass of `base`.
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
