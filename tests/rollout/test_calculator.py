"""The calculator computes arithmetic and refuses everything else that a model may write."""

import pytest

from megatron_dsrl.rollout.calculator import answer, calculate


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("12*7", "84"),
        (" 4+9 - 5 ", "8"),
        ("-(2+3)**2", "-25"),
        ("7//2 + 7%2", "4"),
        ("6/3", "2"),
        ("1/3", "0.333333333333"),
        ("2**150", str(2**150)),
        ("2**200", "error: too large"),
        ("9**9**9", "error: too large"),
        ("1/0", "error: division by zero"),
        ("(-1)**0.5", "error: not a real number"),
        ("1" * 201, "error: longer than 200 characters"),
    ],
)
def test_values_and_errors(expression, value) -> None:
    assert answer(expression) == value


@pytest.mark.parametrize("expression", ["", "=", "1+", "1 2", "True", "x", "0or 1", "(" * 150, "__import__('os')", "٣"])
def test_everything_else_is_not_arithmetic(expression) -> None:
    with pytest.raises(ValueError, match="not an arithmetic expression"):
        calculate(expression)
