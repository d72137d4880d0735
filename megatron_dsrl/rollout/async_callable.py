"""Users' asynchronous functions by their dotted paths, with options from the configuration."""

import inspect
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Any

from megatron_dsrl.common.errors import UserError
from megatron_dsrl.config.dotted_path import object_at

AsyncCallable = Callable[[Any], Awaitable[Any]]


def async_callable(path: str, options: Mapping[str, Any], field: str) -> AsyncCallable:
    """What a path names, with its options: a function of one argument.

    Args:
        path: names a function that begins with `async def`, or a class whose instances can be called like one. A class
            gets the options once, when the run starts.
        field: that holds the path, for messages; `<field>_options` holds the options.

    Raises:
        UserError: it does not exist, is not asynchronous, does not take these options, or refuses them.
    """
    try:
        found = object_at(path)
    except ValueError as error:
        raise UserError(f"{field}: {error}") from error
    is_class = inspect.isclass(found)
    if not inspect.iscoroutinefunction(getattr(found, "__call__", None) if is_class else found):  # noqa: B004
        module, _, name = path.partition(":")
        raise UserError(
            f"{field}: `{module}` has no function `{name}` that begins with `async def`, and no class with an "
            "`async def __call__`"
        )
    try:
        inspect.signature(found).bind(*(() if is_class else (None,)), **options)
    except TypeError as error:
        raise UserError(f"{field}_options: {path} does not take these options: {error}") from error
    if not is_class:
        return partial(found, **options)
    try:
        return found(**options)
    except UserError as error:
        raise UserError(f"{field}: {path}: {error}") from error
