"""Numbers in configuration files and records."""

from typing import Any, TypeGuard


def is_number(value: Any) -> TypeGuard[int | float]:
    """Whether a value is an int or float; true and false are not numbers, although bool is a subclass of int."""
    return isinstance(value, int | float) and not isinstance(value, bool)
