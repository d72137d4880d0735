"""The result of a reward function, as plain data that any process can read."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import SupportsFloat, TypeGuard

LARGEST_REWARD = 3.4028234663852886e38
"""The largest float32, since advantages are computed in float32."""
LONGEST_PROBLEM = 500
"""Characters."""


@dataclass(frozen=True)
class Score:
    """A finite reward, or the problem."""

    reward: float
    problem: str | None = None


def score_of(judge: Callable[[], object]) -> Score:
    """Call a reward function, turning anything that it raises or returns into a number or a problem.

    Any real scalar is a reward: Python numbers, NumPy scalars, zero-dimensional tensors.
    """
    try:
        result = judge()
    except BaseException as error:  # also SystemExit, which must not end the worker
        return Score(0.0, f"raised {_described(error)}")
    if _is_real_scalar(result):
        try:
            reward = float(result)
        except Exception as error:
            return Score(0.0, f"returned a {type(result).__name__} that is not a number: {_described(error)}")
        if math.isfinite(reward) and abs(reward) <= LARGEST_REWARD:
            return Score(reward)
    return Score(0.0, f"returned {_described(result)}, which is not a finite number")


def _is_real_scalar(value: object) -> TypeGuard[SupportsFloat]:
    return hasattr(value, "__float__") and tuple(getattr(value, "shape", ())) == ()


def _described(value: object) -> str:
    kind = type(value)
    try:
        text = repr(value)
    except Exception:
        text = f"<a {kind.__name__} without a repr>"
    if not isinstance(value, BaseException):
        text = f"{text} of type {kind.__name__}"
    return str(text)[:LONGEST_PROBLEM]
