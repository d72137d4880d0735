"""A calculator for text that a model wrote: arithmetic only, never `eval`, with limits on size."""

import ast
import operator
import re
from collections.abc import Callable

LONGEST_EXPRESSION = 200
"""Characters."""
LARGEST_NUMBER = 10**50
"""Limit on the size of every intermediate result."""
LARGEST_EXPONENT = 200

_CHARACTERS = re.compile(r"[0-9. +\-*/%()]+")

Number = int | float

_BINARY: dict[type[ast.operator], Callable[[Number, Number], Number]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
_UNARY: dict[type[ast.unaryop], Callable[[Number], Number]] = {ast.UAdd: operator.pos, ast.USub: operator.neg}


def calculate(expression: str) -> Number:
    """The value of an expression of numbers, `+ - * / // % **` and parentheses, such as `12*(7-3)`. Raises ValueError
    if it is not such an expression, has no value, or a number in it is too large."""
    expression = expression.strip()
    if len(expression) > LONGEST_EXPRESSION:
        raise ValueError(f"longer than {LONGEST_EXPRESSION} characters")
    if not _CHARACTERS.fullmatch(expression):
        raise ValueError("not an arithmetic expression")
    try:
        tree = ast.parse(expression, mode="eval")
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        raise ValueError("not an arithmetic expression") from error
    try:
        return _value(tree.body)
    except ZeroDivisionError as error:
        raise ValueError("division by zero") from error
    except OverflowError as error:
        raise ValueError("too large") from error


def answer(expression: str) -> str:
    """The value as text, integers without a decimal point and others with 12 digits; `error: ...` if it has none."""
    try:
        value = calculate(expression)
    except ValueError as error:
        return f"error: {error}"
    return str(int(value)) if value == int(value) else f"{value:.12g}"


async def calculator(expression: str) -> str:
    """`answer` as a tool of `ToolChat`."""
    return answer(expression)


def _value(node: ast.expr) -> Number:
    match node:
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            return _limited(value)
        case ast.UnaryOp(op=sign, operand=operand) if type(sign) in _UNARY:
            return _UNARY[type(sign)](_value(operand))
        case ast.BinOp(left=left, op=operation, right=right) if type(operation) in _BINARY:
            first, second = _value(left), _value(right)
            if isinstance(operation, ast.Pow) and abs(second) > LARGEST_EXPONENT:
                raise ValueError("too large")
            return _limited(_BINARY[type(operation)](first, second))
    raise ValueError("not an arithmetic expression")


def _limited(value: object) -> Number:
    if not isinstance(value, int | float):  # the root of a negative number is complex
        raise ValueError("not a real number")
    if not abs(value) <= LARGEST_NUMBER:
        raise ValueError("too large")
    return value
