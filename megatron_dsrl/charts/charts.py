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

from megatron_dsrl.charts.chart_axes import SMALL, STEPS, VALUES, Axes, Frame, StepAxis, ValueAxis, fitting_axes
from megatron_dsrl.charts.chart_shapes import area, cursor, curve, grid, phase_bands
from megatron_dsrl.charts.chart_source import ChartSource, Series, number
from megatron_dsrl.common.disk import write_result
from megatron_dsrl.common.errors import UserError
from megatron_dsrl.observability.run_records import PhaseSpan

_SOURCES = TypeAdapter(list[ChartSource])


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
    """Curves over steps, with error bars where a series has them; the first series lies on top."""
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
    """The chart of its source."""
    axes, shapes = _DRAWINGS[source.kind](source, frame)
    return _chart(source, axes, shapes)


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


_DRAWINGS = {"lines": _lines, "areas": _areas}


def _chart(source: ChartSource, axes: Axes, shapes: Sequence[str]) -> Chart:
    steps, series, frame = source.all_steps(), source.series, axes.frame
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


_Points = Mapping[int, tuple[float, float | None]]
"""Value and error of a series by step, where it has a value."""


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


def write_charts(charts: Sequence[Chart], path: Path) -> None:
    """Write what charts show as JSON, to be drawn again by a page that may look otherwise."""
    write_result(path, _SOURCES.dump_json([chart.source for chart in charts]).decode() + "\n")


def read_charts(path: Path) -> list[Chart]:
    """The charts of a file that `write_charts` wrote.

    Raises:
        UserError: the file holds no charts.
    """
    try:
        return [draw(source) for source in _SOURCES.validate_json(path.read_bytes())]
    except ValidationError as error:
        problem = error.errors()[0]["msg"]
        raise UserError(f"{path} does not hold charts: {problem}. Delete it, or run the analysis again") from error
