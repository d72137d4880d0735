"""What a chart shows: curves over steps, phases, axes and words. `charts` draws it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

from megatron_dsrl.charts.chart_axes import STEPS, VALUES, StepAxis, ValueAxis
from megatron_dsrl.observability.records import Record
from megatron_dsrl.observability.run_records import PhaseSpan

SERIES_COLOURS = 6


@dataclass(frozen=True)
class Series:
    """One named curve over steps, or over what else the chart's horizontal axis counts."""

    name: str
    steps: tuple[int, ...]
    """Ascending. A step that is not here is skipped over by the curve."""
    values: tuple[float | None, ...]
    """One per step; None leaves a hole in the curve."""
    colour: int
    """Counted from 1; the number of the CSS class `series-N`."""
    errors: tuple[float | None, ...] | None = None
    """Half the length of the error bar at every step; None for no bars."""
    breaks: tuple[int, ...] = ()
    """Steps at which the curve begins again, because the value is not comparable with the ones before."""

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
    vertical: ValueAxis = field(default=VALUES)
    horizontal: StepAxis = field(default=STEPS)

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
    """A value for people, with its error: integers and thousands in full, else three significant digits."""
    if value is None:
        return "none"
    return _plain_number(value) + ("" if error is None else f" ± {float(f'{error:.2g}'):g}")


def _plain_number(value: float) -> str:
    if abs(value) >= 1000 or value == int(value):
        return f"{value:,.0f}"
    if abs(value) < 0.001:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    return f"{value:.3g}"
