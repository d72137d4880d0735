"""The shapes of a chart's SVG. Colours come from `charts.css` by class, so that one drawing serves light and dark."""

from collections.abc import Sequence

from markupsafe import escape

from megatron_dsrl.charts.chart_axes import Axes
from megatron_dsrl.charts.chart_source import Series, number
from megatron_dsrl.observability.run_records import PhaseSpan

CHARACTER = 6.8
"""Width of a character at the charts' font size of 11, generously."""
MOST_DOTS = 25


def text_width(text: str) -> float:
    """About how wide a text is in a drawing; too wide rather than too narrow."""
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
    """Coordinates of the points that are needed to see all of them."""
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
