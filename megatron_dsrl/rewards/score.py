"""The result of a reward function, as plain data that any process can read."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, SupportsFloat, TypeGuard

LARGEST_REWARD = 3.4028234663852886e38
"""The largest float32, since advantages are computed in float32."""
LONGEST_PROBLEM = 500
"""Characters."""

Verdict = Literal["ok", "fallback", "timeout", "error"]
"""`fallback`: another verifier decided (`judge`). `timeout`: the time limit was exceeded. `error`: the function raised,
died, or returned no finite number."""


class FallbackReward(float):
    """A reward by another verifier, because the one that the configuration names gave none."""

    why: str

    def __new__(cls, reward: float, why: str) -> "FallbackReward":
        """`why`: what went wrong, as a clause."""
        self = super().__new__(cls, reward)
        self.why = why
        return self


@dataclass(frozen=True)
class Score:
    """A finite reward, or the problem."""

    reward: float
    problem: str | None = None
    why_fallback: str | None = None
    """For a `FallbackReward`."""


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
            return Score(reward, why_fallback=result.why if isinstance(result, FallbackReward) else None)
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
