"""Line charts and stacked area charts as inline SVG, drawn here because a page needs little and must obey its theme.

Colours come from the page's style sheet by class (`series-1`, `phase-2`), so that one drawing serves light and dark.
Every chart carries its data as JSON, from which the page's script shows the values under the pointer.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from markupsafe import Markup, escape

from megatron_dsrl.observability.chart_axes import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    STEPS,
    TOP,
    WIDTH,
    Axes,
    StepAxis,
    fitting_axes,
    ticks,
)
from megatron_dsrl.observability.records import Record

SERIES_COLOURS = 6
PHASE_COLOURS = 4


@dataclass(frozen=True)
class Series:
    """One named curve over steps, or over whatever the chart's horizontal axis counts."""

    name: str
    steps: tuple[int, ...]
    """Ascending. A step that is not here is skipped over by the curve."""
    values: tuple[float | None, ...]
    """One per step; None leaves a hole in the curve."""
    colour: int
    """From 1; the number of a `series-N` class."""
    errors: tuple[float | None, ...] | None = None
    """Half the length of the error bar at every step; None for no bars."""

    @classmethod
    def of_records(cls, records: Sequence[Record], name: str, key: str, colour: int) -> "Series":
        """What records of ascending steps say under a key."""
        return cls(name, tuple(record["step"] for record in records), tuple(record[key] for record in records), colour)

    def in_words(self) -> dict[int, str]:
        """The value at every step for people, with its error."""
        errors = self.errors or (None,) * len(self.values)
        return {
            step: number(value) + ("" if error is None else f" ± {error:.2g}")
            for step, value, error in zip(self.steps, self.values, errors, strict=True)
        }


@dataclass(frozen=True)
class PhaseSpan:
    """Consecutive steps of one phase."""

    name: str
    first_step: int
    last_step: int
    colour: int
    """From 1; the number of a `phase-N` class."""


@dataclass(frozen=True)
class ChartSource:
    """What a chart shows: enough to draw it again."""

    kind: Literal["lines", "areas"]
    title: str
    explanation: str
    series: tuple[Series, ...]
    phases: tuple[PhaseSpan, ...] = ()
    top: float | None = None
    """Upper end of the value axis; None fits it to the values."""
    horizontal: StepAxis = field(default=STEPS)

    def all_steps(self) -> list[int]:
        """Of any series, ascending."""
        return sorted({step for one in self.series for step in one.steps})


@dataclass(frozen=True)
class Chart:
    """A drawn chart, ready for the page."""

    source: ChartSource
    svg: Markup
    legend: tuple[tuple[int, str, str], ...]
    """Colour, name and value of every series at `legend_step`."""
    legend_step: int
    """The step whose values the legend shows: the last one with a value."""
    data: str
    """JSON: steps, phase names and values by series, for the page's script."""


def line_chart(
    title: str,
    explanation: str,
    series: Sequence[Series],
    phases: Sequence[PhaseSpan] = (),
    top: float | None = None,
    horizontal: StepAxis = STEPS,
) -> Chart:
    """Curves over steps, with error bars where a series has them. `top` fixes the upper end of the value axis."""
    return draw(ChartSource("lines", title, explanation, tuple(series), tuple(phases), top, horizontal))


def stacked_chart(
    title: str,
    explanation: str,
    series: Sequence[Series],
    phases: Sequence[PhaseSpan] = (),
) -> Chart:
    """Areas of non-negative values on top of each other, the first series at the bottom. A hole counts as zero.

    All series have the same steps.
    """
    return draw(ChartSource("areas", title, explanation, tuple(series), tuple(phases)))


def draw(source: ChartSource) -> Chart:
    """The chart of its source."""
    return _DRAWINGS[source.kind](source)


def number(value: float | None) -> str:
    """A value for people: integers and thousands in full, else three significant digits; `none` for a missing one."""
    if value is None:
        return "none"
    if abs(value) >= 1000 or value == int(value):
        return f"{value:,.0f}"
    if abs(value) < 0.001:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    return f"{value:.3g}"


def _tick_label(value: float) -> str:
    for unit, suffix in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= unit:
            divisor = 1e3 if suffix == "k" else unit
            return f"{value / divisor:g}{suffix}"
    return number(value)


def _extremes(series: Sequence[Series], with_errors: bool) -> list[float]:
    extremes = []
    for one in series:
        errors = (one.errors if with_errors else None) or (None,) * len(one.values)
        for value, error in zip(one.values, errors, strict=True):
            if value is not None:
                extremes += [value - (error or 0.0), value + (error or 0.0)]
    return extremes


def _lines(source: ChartSource) -> Chart:
    # Where the upper end is fixed, error bars may be cut off.
    axes = _axes(source, _extremes(source.series, with_errors=source.top is None))
    return _chart(source, axes, [shape for one in source.series for shape in _curve(axes, one)])


def _areas(source: ChartSource) -> Chart:
    steps = source.series[0].steps
    lower = [0.0] * len(steps)
    bands = []
    for one in source.series:
        upper = [base + (value or 0.0) for base, value in zip(lower, one.values, strict=True)]
        bands.append((one, lower, upper))
        lower = upper
    axes = _axes(source, [0.0, *lower])
    return _chart(source, axes, [_area(axes, steps, below, above, one.colour) for one, below, above in bands])


_DRAWINGS = {"lines": _lines, "areas": _areas}


def _axes(source: ChartSource, extremes: Sequence[float]) -> Axes:
    steps = source.all_steps()
    low, high = min(extremes, default=0.0), max(extremes, default=1.0)
    return fitting_axes(source.horizontal, steps[0], steps[-1], low, high, source.top)


def _chart(source: ChartSource, axes: Axes, shapes: Sequence[str]) -> Chart:
    steps, series = source.all_steps(), source.series
    content = "".join([*_phase_bands(axes, source.phases), *_grid(axes), *shapes, _cursor()])
    values = [one.in_words() for one in series]
    words = escape(_words(source))
    svg = Markup(f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" tabindex="0" aria-label="{words}">{content}</svg>')
    data = {
        "steps": steps,
        "x": [round(axes.x(step) / WIDTH, 4) for step in steps],
        "phases": [_phase_at(source.phases, step) for step in steps],
        "series": [[by_step.get(step, number(None)) for step in steps] for by_step in values],
    }
    known = [step for one in series for step, value in zip(one.steps, one.values, strict=True) if value is not None]
    shown = max(known, default=steps[-1])
    legend = tuple(
        (one.colour, one.name, by_step.get(shown, number(None))) for one, by_step in zip(series, values, strict=True)
    )
    return Chart(source, svg, legend, shown, json.dumps(data))


def _phase_at(phases: Sequence[PhaseSpan], step: int) -> str:
    return next((phase.name for phase in phases if phase.first_step <= step <= phase.last_step), "")


def _words(source: ChartSource) -> str:
    """The alternative text: what a reader would take from the picture."""
    sentences, at = [], f"at {source.horizontal.name}"
    for one in source.series:
        known = [(step, value) for step, value in zip(one.steps, one.values, strict=True) if value is not None]
        if not known:
            continue
        (first_step, first), (last_step, last) = known[0], known[-1]
        peak_step, peak = max(known, key=lambda point: point[1])
        sentences.append(
            f"{one.name}: {number(first)} {at} {first_step}, {number(last)} {at} {last_step},"
            f" highest {number(peak)} {at} {peak_step}."
        )
    return f"{source.title}. " + " ".join(sentences)


def _phase_bands(axes: Axes, phases: Sequence[PhaseSpan]) -> list[str]:
    """A tinted background per phase, with a stronger strip at the top edge that areas do not cover."""
    shapes = []
    for phase in phases:
        left = max(axes.x(phase.first_step - 0.5), LEFT)
        right = min(axes.x(phase.last_step + 0.5), WIDTH - RIGHT)
        if right <= left:
            continue
        box = f'x="{left:.1f}" width="{right - left:.1f}"'
        shapes.append(f'<rect class="band phase-{phase.colour}" {box} y="{TOP}" height="{HEIGHT - TOP - BOTTOM}"/>')
        shapes.append(f'<rect class="strip phase-{phase.colour}" {box} y="{TOP - 6}" height="4"/>')
    return shapes


def _grid(axes: Axes) -> list[str]:
    shapes = []
    for value in ticks(axes.low, axes.high):
        y = axes.y(value)
        kind = "zero" if value == 0 else "grid"
        shapes.append(f'<line class="{kind}" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        shapes.append(f'<text x="{LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{escape(_tick_label(value))}</text>')
    for step in axes.step_ticks():
        x = axes.x(step)
        shapes.append(f'<text x="{x:.1f}" y="{HEIGHT - 8}" text-anchor="middle">{step}</text>')
    return shapes


def _curve(axes: Axes, series: Series) -> list[str]:
    """Polylines between holes, dots where there are few points, and error bars."""
    shapes = []
    errors = series.errors or (None,) * len(series.steps)
    points = [
        (axes.x(step), value, error)
        for step, value, error in zip(series.steps, series.values, errors, strict=True)
    ]
    known = [point for point in points if point[1] is not None]
    for x, value, error in known:
        if error:
            low, high = axes.y(max(value - error, axes.low)), axes.y(min(value + error, axes.high))
            shapes.append(f'<path class="bar series-{series.colour}" d="M{x:.1f} {low:.1f}V{high:.1f}"/>')
    path, pen_down = [], False
    for x, value, _ in points:
        if value is not None:
            command, end = ("L", "") if pen_down else ("M", "h0")  # h0: a lone point still shows as a dot
            path.append(f"{command}{x:.1f} {axes.y(value):.1f}{end}")
        pen_down = value is not None
    shapes.append(f'<path class="line series-{series.colour}" d="{"".join(path)}"/>')
    if len(known) <= 25:
        shapes += [
            f'<circle class="dot series-{series.colour}" cx="{x:.1f}" cy="{axes.y(value):.1f}" r="2.2"/>'
            for x, value, _ in known
        ]
    return shapes


def _area(axes: Axes, steps: Sequence[int], below: Sequence[float], above: Sequence[float], colour: int) -> str:
    xs = [axes.x(step) for step in steps]
    if len(xs) == 1:  # one step: a column instead of a line without width
        xs, below, above = [xs[0] - 20, xs[0] + 20], list(below) * 2, list(above) * 2
    there = [f"{x:.1f} {axes.y(value):.1f}" for x, value in zip(xs, above, strict=True)]
    back = [f"{x:.1f} {axes.y(value):.1f}" for x, value in zip(reversed(xs), reversed(below), strict=True)]
    return f'<path class="area series-{colour}" d="M{"L".join([*there, *back])}Z"/>'


def _cursor() -> str:
    return f'<line class="cursor" x1="0" x2="0" y1="{TOP}" y2="{HEIGHT - BOTTOM}" visibility="hidden"/>'
