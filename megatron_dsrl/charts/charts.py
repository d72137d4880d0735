"""Line charts and stacked area charts as inline SVG, with their data as JSON for the page's script.

Drawn here rather than by a library, because the same drawing must serve the page (light, dark, printed, without a
script), Markdown and a folder of figures. uPlot draws on a canvas, for the page alone, and has no error bars and no
stacked areas; matplotlib and Altair draw files that do not follow the reader's colour scheme. With one of each, the
repository would have two systems and a larger page in place of these few hundred lines.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape
from pydantic import TypeAdapter, ValidationError

from megatron_dsrl.charts.chart_source import (
    SMALL,
    STEPS,
    VALUES,
    Axes,
    ChartSource,
    Frame,
    Series,
    StepAxis,
    ValueAxis,
    fitting_axes,
    number,
)
from megatron_dsrl.common.disk import write_result
from megatron_dsrl.common.errors import UserError
from megatron_dsrl.observability.run_records import PhaseSpan

CHARACTER = 6.8
"""Width of a character at the charts' font size of 11, rounded up."""
MOST_DOTS = 25
_SOURCES = TypeAdapter(list[ChartSource])
_Points = Mapping[int, tuple[float, float | None]]
"""Value and error of a series by the steps that have a value."""


@dataclass(frozen=True)
class Chart:
    """A drawn chart, ready for the page."""

    source: ChartSource
    frame: Frame
    svg: Markup
    legend: tuple[tuple[int, str, str], ...]
    """Colour, name and value of every series at `legend_step`."""
    legend_step: int
    """The step whose values the legend shows: the last one with a value."""
    data: str
    """JSON: steps, phases, axes and values by series, for the page's script."""


def line_chart(
    title: str,
    explanation: str,
    series: Sequence[Series],
    phases: Sequence[PhaseSpan] = (),
    vertical: ValueAxis = VALUES,
    horizontal: StepAxis = STEPS,
) -> Chart:
    """Curves over steps, with error bars if a series has them; the first series lies on top."""
    return draw(ChartSource("lines", title, explanation, tuple(series), tuple(phases), vertical, horizontal))


def stacked_chart(
    title: str,
    explanation: str,
    series: Sequence[Series],
    phases: Sequence[PhaseSpan] = (),
    vertical: ValueAxis = VALUES,
) -> Chart:
    """Areas of non-negative values on top of each other, the first series at the bottom. A hole counts as zero.

    All series have the same steps.
    """
    return draw(ChartSource("areas", title, explanation, tuple(series), tuple(phases), vertical))


def draw(source: ChartSource, frame: Frame = SMALL) -> Chart:
    """The chart of its source, whose series share their steps."""
    axes, shapes = (_lines if source.kind == "lines" else _areas)(source, frame)
    steps, series = source.all_steps(), source.series
    content = "".join([*phase_bands(axes, source.phases), *grid(axes), *shapes, cursor(axes)])
    words = escape(source.in_words())
    svg = Markup(
        f'<svg viewBox="0 0 {frame.width} {frame.height}" role="img" tabindex="0" aria-label="{words}">{content}</svg>'
    )
    known = [{step: (value, error) for step, value, error in one.known()} for one in series]
    shown = max((max(points) for points in known if points), default=steps[-1])
    at_shown = [number(*points.get(shown, (None, None))) for points in known]
    legend = tuple((one.colour, one.name, value) for one, value in zip(series, at_shown, strict=True))
    return Chart(source, frame, svg, legend, shown, json.dumps(_data(source, axes, known), separators=(",", ":")))


def _lines(source: ChartSource, frame: Frame) -> tuple[Axes, list[str]]:
    extremes = [
        end
        for one in source.series
        for _, value, error in one.known()
        for end in (value - (error or 0.0), value + (error or 0.0))
    ]
    axes = fitting_axes(source.horizontal, source.vertical, source.all_steps(), extremes, frame)
    return axes, [shape for one in reversed(source.series) for shape in curve(axes, one)]


def _areas(source: ChartSource, frame: Frame) -> tuple[Axes, list[str]]:
    steps = source.series[0].steps
    lower = [0.0] * len(steps)
    bands = []
    for one in source.series:
        upper = [base + (value or 0.0) for base, value in zip(lower, one.values, strict=True)]
        bands.append((one, lower, upper))
        lower = upper
    axes = fitting_axes(source.horizontal, source.vertical, source.all_steps(), lower, frame)
    return axes, [area(axes, steps, below, above, one.colour) for one, below, above in bands]


def _data(source: ChartSource, axes: Axes, known: Sequence[_Points]) -> dict[str, Any]:
    """Data for the page's script to show values, smooth curves and save them as CSV."""
    frame, horizontal, vertical, steps = axes.frame, axes.horizontal, axes.vertical, source.all_steps()
    consecutive = len(steps) == steps[-1] - steps[0] + 1
    return {
        "kind": source.kind,
        "title": source.title,
        "counts": horizontal.name,
        "steps": {"from": steps[0], "to": steps[-1]} if consecutive else steps,
        "x": {"log": 2 * horizontal.is_log2, "ends": [axes.first, axes.last], "places": [frame.left, frame.right_edge]},
        "y": {"log": 10 * vertical.is_log, "ends": [axes.low, axes.high], "places": [frame.bottom_edge, frame.top]},
        "phases": [[phase.name, phase.first_step, phase.last_step] for phase in source.phases],
        "series": [_series_data(one, points, steps) for one, points in zip(source.series, known, strict=True)],
    }


def _series_data(series: Series, points: _Points, steps: Sequence[int]) -> dict[str, Any]:
    """Values at the chart's steps, with six digits."""
    values = [points.get(step, (None, None)) for step in steps]
    data: dict[str, Any] = {"name": series.name, "values": [_six_digits(value) for value, _ in values]}
    if series.errors is not None:
        data["errors"] = [_six_digits(error) for _, error in values]
    if series.breaks:
        data["breaks"] = series.breaks
    return data


def _six_digits(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.6g}")


def text_width(text: str) -> float:
    """Approximate width of a text in a drawing; errs on the wide side."""
    return CHARACTER * sum(1.3 if character.isupper() else 1.0 for character in text)


def phase_bands(axes: Axes, phases: Sequence[PhaseSpan]) -> list[str]:
    """A tinted background per phase, above it a stronger strip, and the name where the phase begins if it fits."""
    frame, shapes, free_from = axes.frame, [], 0.0
    for phase in phases:
        left = max(axes.x(phase.first_step - 0.5), frame.left)
        right = min(axes.x(phase.last_step + 0.5), frame.right_edge)
        if right <= left:
            continue
        box = f'x="{left:.1f}" width="{right - left:.1f}"'
        height = frame.bottom_edge - frame.top
        shapes.append(f'<rect class="band phase-{phase.colour}" {box} y="{frame.top}" height="{height}"/>')
        shapes.append(f'<rect class="strip phase-{phase.colour}" {box} y="{frame.top - 6}" height="4"/>')
        start, width = max(left, free_from), text_width(phase.name)
        if start < right and start + width <= frame.width:
            shapes.append(f'<text x="{start:.1f}" y="{frame.top - 10}">{escape(phase.name)}</text>')
            free_from = start + width + 4
    return shapes


def grid(axes: Axes) -> list[str]:
    """Lines at round values, labels of both axes and their names."""
    frame, shapes = axes.frame, []
    for value in axes.value_ticks():
        y = axes.y(value)
        kind = "zero" if value == 0 else "grid"
        shapes.append(f'<line class="{kind}" x1="{frame.left}" x2="{frame.right_edge}" y1="{y:.1f}" y2="{y:.1f}"/>')
        label = escape(_tick_label(value))
        shapes.append(f'<text x="{frame.left - 6}" y="{y + 3.5:.1f}" text-anchor="end">{label}</text>')
    for step in axes.step_ticks():
        label_y = frame.bottom_edge + 14
        shapes.append(f'<text x="{axes.x(step):.1f}" y="{label_y}" text-anchor="middle">{step}</text>')
    middle_x, middle_y = (frame.left + frame.right_edge) / 2, (frame.top + frame.bottom_edge) / 2
    name = escape(axes.horizontal.label or axes.horizontal.name)
    shapes.append(f'<text class="axis" x="{middle_x:g}" y="{frame.height - 6}" text-anchor="middle">{name}</text>')
    if name := escape(axes.vertical.name):
        turned = f'transform="translate(11 {middle_y:g}) rotate(-90)"'
        shapes.append(f'<text class="axis" {turned} text-anchor="middle">{name}</text>')
    return shapes


def curve(axes: Axes, series: Series) -> list[str]:
    """A line between holes and breaks, dots for short series, and error bars."""
    shapes, known = [], series.known()
    for step, value, error in known if series.errors else ():
        if error:
            x, low, high = axes.x(step), axes.y(value - error), axes.y(value + error)
            shapes.append(f'<path class="bar series-{series.colour}" d="M{x:.1f} {low:.1f}V{high:.1f}"/>')
    path = ""
    for piece in series.pieces():
        points = _drawn(axes, piece)
        path += f"M{points[0]}h0" + "".join(f"L{point}" for point in points[1:])  # h0: a lone point shows as a dot
    shapes.append(f'<path class="line series-{series.colour}" d="{path}"/>')
    if len(known) <= MOST_DOTS:
        shapes += [
            f'<circle class="dot series-{series.colour}" cx="{axes.x(step):.1f}" cy="{axes.y(value):.1f}" r="2.2"/>'
            for step, value, _ in known
        ]
    return shapes


def area(axes: Axes, steps: Sequence[int], below: Sequence[float], above: Sequence[float], colour: int) -> str:
    """The area between two curves."""
    upper, lower = (_drawn(axes, list(zip(steps, edge, strict=True))) for edge in (above, below))
    if len(steps) == 1:  # a column instead of a line without width
        x, top, bottom = axes.x(steps[0]), axes.y(above[0]), axes.y(below[0])
        upper, lower = ([f"{x + side:.1f} {y:.1f}" for side in (-20, 20)] for y in (top, bottom))
    return f'<path class="area series-{colour}" d="M{"L".join([*upper, *reversed(lower)])}Z"/>'


def cursor(axes: Axes) -> str:
    """The line that the page's script moves."""
    frame = axes.frame
    return f'<line class="cursor" x1="0" x2="0" y1="{frame.top}" y2="{frame.bottom_edge}" visibility="hidden"/>'


def _drawn(axes: Axes, points: Sequence[tuple[int, float]]) -> list[str]:
    """Coordinates of the points, without those that would not be visible."""
    kept = _thinned([(axes.x(step), value) for step, value in points])
    return [f"{x:.1f} {axes.y(value):.1f}" for x, value in kept]


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Reduce the points without changing the picture: keep the first, highest, lowest and last per unit of width."""
    columns: dict[int, list[tuple[float, float]]] = {}
    for point in points:
        columns.setdefault(int(point[0]), []).append(point)
    kept: list[tuple[float, float]] = []
    for column in columns.values():
        if len(column) > 4:
            values = [value for _, value in column]
            ends = {0, values.index(min(values)), values.index(max(values)), len(column) - 1}
            column = [column[index] for index in sorted(ends)]
        kept += column
    return kept


def _tick_label(value: float) -> str:
    for unit, suffix in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= unit:
            divisor = 1e3 if suffix == "k" else unit
            return f"{value / divisor:g}{suffix}"
    return number(value)


def write_charts(charts: Sequence[Chart], path: Path) -> None:
    """Write the charts' data as JSON, from which a page can redraw them in its own style."""
    write_result(path, _SOURCES.dump_json([chart.source for chart in charts]).decode() + "\n")


def read_charts(path: Path) -> list[Chart]:
    """The charts of a file that `write_charts` wrote. Raises UserError if the file holds no charts."""
    try:
        return [draw(source) for source in _SOURCES.validate_json(path.read_bytes())]
    except ValidationError as error:
        problem = error.errors()[0]["msg"]
        raise UserError(f"{path} does not hold charts: {problem}. Delete it, or run the analysis again") from error
