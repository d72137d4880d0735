"""What a chart shows: curves over steps, phases, axes and words. charts.py draws it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from megatron_dsrl.observability.records import Record
from megatron_dsrl.observability.run_records import PhaseSpan

MOST_STEP_LABELS = 12
MOST_DECADE_LABELS = 6
SERIES_COLOURS = 6


@dataclass(frozen=True)
class Frame:
    """Size and margins of a drawing, in units of its view box, and the edges of the plotting area."""

    width: int
    height: int
    left: int = 58
    right: int = 12
    top: int = 22
    bottom: int = 36

    @property
    def right_edge(self) -> int:
        return self.width - self.right

    @property
    def bottom_edge(self) -> int:
        return self.height - self.bottom


SMALL = Frame(400, 230)
"""One of many charts on a page."""
WIDE = Frame(720, 330)
"""A figure alone in its file."""


@dataclass(frozen=True)
class StepAxis:
    """Meaning of the horizontal axis."""

    name: str = "step"
    """Precedes a number in text, as in `step 5`."""
    is_log2: bool = False
    """Doubling is a constant distance; for numbers from 1."""
    label: str = ""
    """Label below the axis; empty: the name."""

    def scaled(self, step: float) -> float:
        """A step in units of equal distance."""
        return math.log2(step) if self.is_log2 else step


@dataclass(frozen=True)
class ValueAxis:
    """Meaning of the vertical axis and the part shown: the values and `include`, within the limits."""

    name: str = ""
    """Label beside the axis, with the unit."""
    is_log: bool = False
    """A factor of ten is a constant distance. Zero and negative values lie on the lower edge."""
    at_least: float | None = None
    """No value can be lower, so an error bar that reaches further is cut off; None for no limit."""
    at_most: float | None = None
    """No value can be higher; None for no limit."""
    include: tuple[float, ...] = (0.0,)
    """Values that a linear axis always shows."""

    def scaled(self, value: float) -> float:
        """A value in units of equal distance; -inf for values that a logarithmic axis cannot show."""
        if not self.is_log:
            return value
        return math.log10(value) if value > 0 else -math.inf

    def ends(self, values: Sequence[float]) -> tuple[float, float]:
        """Lower and upper end, scaled, for the values to show (error bars included)."""
        if self.is_log:
            decades = [self.scaled(value) for value in values if value > 0] or [0.0]
            lowest = math.floor(min(decades))
            return lowest, max(lowest + 1, math.ceil(max(decades)))
        low, high = self._limited(min((*values, *self.include))), self._limited(max((*values, *self.include)))
        rounded = ticks(low, high if high > low else low + 1.0)
        return self._limited(rounded[0]), self._limited(rounded[-1])

    def _limited(self, value: float) -> float:
        value = value if self.at_least is None else max(value, self.at_least)
        return value if self.at_most is None else min(value, self.at_most)


STEPS = StepAxis()
"""The steps of a run."""
VALUES = ValueAxis()
"""Any values, from zero."""


@dataclass(frozen=True)
class Axes:
    """The mapping from steps and values to the drawing's coordinates."""

    first: float
    """Left end, scaled."""
    last: float
    """Right end, scaled."""
    low: float
    """Lower end, scaled."""
    high: float
    """Upper end, scaled."""
    horizontal: StepAxis
    vertical: ValueAxis
    frame: Frame

    def x(self, step: float) -> float:
        """Position of a step."""
        share = (self.horizontal.scaled(step) - self.first) / (self.last - self.first)
        return self.frame.left + share * (self.frame.right_edge - self.frame.left)

    def y(self, value: float) -> float:
        """Position of a value; at the edge if it is beyond the axis."""
        share = (min(max(self.vertical.scaled(value), self.low), self.high) - self.low) / (self.high - self.low)
        return self.frame.bottom_edge - share * (self.frame.bottom_edge - self.frame.top)

    def step_ticks(self) -> list[int]:
        """Steps labelled on the horizontal axis."""
        first, last = math.ceil(self.first), math.floor(self.last)
        if self.horizontal.is_log2:
            every = -(-(last - first + 1) // MOST_STEP_LABELS)
            return [2**exponent for exponent in range(first, last + 1, every)]
        if first == last:
            return [first]
        inner = [round(tick) for tick in ticks(first, last, about=5) if float(tick).is_integer()]
        spacing = (last - first) / MOST_STEP_LABELS
        return [first, *(tick for tick in inner if first + spacing <= tick <= last - spacing), last]

    def value_ticks(self) -> list[float]:
        """Values labelled on the vertical axis."""
        if self.vertical.is_log:
            every = -(-(round(self.high - self.low) + 1) // MOST_DECADE_LABELS)
            return [10.0**exponent for exponent in range(round(self.low), round(self.high) + 1, every)]
        return [tick for tick in ticks(self.low, self.high) if self.low <= tick <= self.high]


def fitting_axes(
    horizontal: StepAxis, vertical: ValueAxis, steps: Sequence[int], values: Sequence[float], frame: Frame
) -> Axes:
    """Axes that hold the steps (at least one) and the values."""
    margin = 0.5 if steps[0] == steps[-1] else 0.0
    first, last = horizontal.scaled(steps[0]) - margin, horizontal.scaled(steps[-1]) + margin
    return Axes(first, last, *vertical.ends(values), horizontal, vertical, frame)


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers that cover low..high in steps of 1, 2 or 5 times a power of ten; the ends included."""
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    digits = max(0, 2 - math.floor(math.log10(step)))
    return [round(index * step, digits) for index in range(first, last + 1)]


@dataclass(frozen=True)
class Series:
    """One named curve over what the horizontal axis counts, usually steps."""

    name: str
    steps: tuple[int, ...]
    """Ascending. The curve skips steps that are missing here."""
    values: tuple[float | None, ...]
    """One per step; None leaves a hole in the curve."""
    colour: int
    """Counted from 1; the number of the CSS class `series-N`."""
    errors: tuple[float | None, ...] | None = None
    """Half the length of the error bar at every step; None for no bars."""
    breaks: tuple[int, ...] = ()
    """Steps at which a new curve begins, because its values are not comparable with those before."""

    @classmethod
    def of_records(cls, records: Sequence[Record], name: str, key: str, colour: int) -> "Series":
        """Values of a key in records with ascending steps."""
        return cls(name, tuple(record["step"] for record in records), tuple(record[key] for record in records), colour)

    def known(self) -> list[tuple[int, float, float | None]]:
        """Steps that have a value, with value and error."""
        errors = self.errors or (None,) * len(self.values)
        points = zip(self.steps, self.values, errors, strict=True)
        return [(step, value, error) for step, value, error in points if value is not None]

    def pieces(self) -> list[list[tuple[int, float]]]:
        """The points between holes and breaks."""
        pieces: list[list[tuple[int, float]]] = [[]]
        for step, value in zip(self.steps, self.values, strict=True):
            if (value is None or step in self.breaks) and pieces[-1]:
                pieces.append([])
            if value is not None:
                pieces[-1].append((step, value))
        return [piece for piece in pieces if piece]


@dataclass(frozen=True)
class ChartSource:
    """What a chart shows: enough to draw it again."""

    kind: Literal["lines", "areas"]
    title: str
    explanation: str
    series: tuple[Series, ...]
    phases: tuple[PhaseSpan, ...] = ()
    vertical: ValueAxis = VALUES
    horizontal: StepAxis = STEPS

    def all_steps(self) -> list[int]:
        """Steps of any series, ascending."""
        return sorted({step for one in self.series for step in one.steps})

    def in_words(self) -> str:
        """The alternative text: what a reader would take from the picture."""
        sentences, at = [], f"at {self.horizontal.name}"
        for one in self.series:
            known = [(step, value) for step, value, _ in one.known()]
            if not known:
                continue
            (first_step, first), (last_step, last) = known[0], known[-1]
            peak_step, peak = max(known, key=lambda point: point[1])
            sentences.append(
                f"{one.name}: {number(first)} {at} {first_step}, {number(last)} {at} {last_step},"
                f" highest {number(peak)} {at} {peak_step}."
            )
        return f"{self.title}. " + " ".join(sentences)


def phase_changes(phases: Sequence[PhaseSpan]) -> tuple[int, ...]:
    """Steps at which another phase begins."""
    return tuple(after.first_step for _, after in pairwise(phases))


def number(value: float | None, error: float | None = None) -> str:
    """A value for display, with its error: integers and thousands in full, else three significant digits."""
    if value is None:
        return "none"
    if abs(value) >= 1000 or value == int(value):
        text = f"{value:,.0f}"
    elif abs(value) < 0.001:
        mantissa, exponent = f"{value:.1e}".split("e")
        text = f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    else:
        text = f"{value:.3g}"
    return text if error is None else f"{text} ± {float(f'{error:.2g}'):g}"
