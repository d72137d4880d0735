"""Numbers in configuration files and records, and in sentences."""

from typing import Any, TypeGuard

from megatron_dsrl.common.errors import UserError


def is_number(value: Any) -> TypeGuard[int | float]:
    """Whether a value is an int or float; true and false are not numbers, although bool is a subclass of int."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def positive_number(value: Any, what: str) -> float:
    """The value as a float; UserError, with a message that begins with `what`, unless it is a number above 0."""
    if not is_number(value) or not value > 0:
        raise UserError(f"{what} must be a positive number, not {value!r}")
    return float(value)


def positive_integer(value: Any, what: str) -> int:
    """The value; UserError, with a message that begins with `what`, unless it is an integer above 0."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{what} must be a positive integer, not {value!r}")
    return value


def counted(count: int, noun: str) -> str:
    """A count with its noun, which has a regular plural: `1 process`, `3 processes`."""
    plural = f"{noun}es" if noun.endswith(("s", "ch")) else f"{noun}s"
    return f"{count:,} {noun if count == 1 else plural}"
