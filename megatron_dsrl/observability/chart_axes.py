"""Axes of a chart: where values lie in the drawing, and which round numbers are written beside it."""

import math
from dataclasses import dataclass

WIDTH, HEIGHT = 400, 210
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 14, 24
MOST_STEP_LABELS = 12


@dataclass(frozen=True)
class StepAxis:
    """What the horizontal axis counts."""

    name: str = "step"
    """In words before a number."""
    is_log2: bool = False
    """Doubling is a constant distance; for numbers from 1."""

    def scaled(self, step: float) -> float:
        """A step in units of equal distance."""
        return math.log2(step) if self.is_log2 else step


STEPS = StepAxis()
"""Of a run."""


@dataclass(frozen=True)
class Axes:
    """The mapping from steps and values to the drawing's coordinates."""

    first: float
    """Left end, scaled."""
    last: float
    """Right end, scaled."""
    low: float
    high: float
    horizontal: StepAxis

    def x(self, step: float) -> float:
        """Of a step."""
        share = (self.horizontal.scaled(step) - self.first) / (self.last - self.first)
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        """Of a value."""
        share = (value - self.low) / (self.high - self.low)
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    def step_ticks(self) -> list[int]:
        """Steps that are written below the axis."""
        first, last = math.ceil(self.first), math.floor(self.last)
        if self.horizontal.is_log2:
            every = -(-(last - first + 1) // MOST_STEP_LABELS)
            return [2**exponent for exponent in range(first, last + 1, every)]
        if first == last:
            return [first]
        inner = [round(tick) for tick in ticks(first, last, about=5) if float(tick).is_integer()]
        spacing = (last - first) / MOST_STEP_LABELS
        return [first, *(tick for tick in inner if first + spacing <= tick <= last - spacing), last]


def fitting_axes(
    horizontal: StepAxis, first_step: int, last_step: int, low: float, high: float, top: float | None
) -> Axes:
    """Axes that hold the steps and the values, zero and `top` if it is given among them."""
    low, high = min(0.0, low), max(0.0, high) if top is None else top
    if low == high:
        high = low + 1.0
    rounded = ticks(low, high)
    margin = 0.5 if first_step == last_step else 0.0
    first, last = horizontal.scaled(first_step) - margin, horizontal.scaled(last_step) + margin
    return Axes(first, last, rounded[0], rounded[-1], horizontal)


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers that cover low..high in steps of 1, 2 or 5 times a power of ten; the ends included."""
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    digits = max(0, 2 - math.floor(math.log10(step)))
    return [round(index * step, digits) for index in range(first, last + 1)]
