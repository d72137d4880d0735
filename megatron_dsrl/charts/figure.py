"""Charts as one self-contained SVG file, for READMEs in light and dark mode."""

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from markupsafe import escape

from megatron_dsrl.charts.chart_source import Series, number
from megatron_dsrl.charts.charts import Chart, text_width
from megatron_dsrl.common.disk import write_result

COLUMNS = 3
TITLE, LEGEND_ROW, MARGIN = 30, 18, 8
SWATCH = 14
BETWEEN = 14
"""Space between entries of a legend."""


def write_figure(charts: Sequence[Chart], path: Path) -> None:
    """Write charts of one size side by side, three in a row, with their titles and legends."""
    frame = charts[0].frame
    rows = -(-len(charts) // COLUMNS)
    legends = [_legend(chart) for chart in charts]
    legend_height = LEGEND_ROW * max(len(legend) for legend in legends)
    cell_width, cell_height = frame.width + 2 * MARGIN, TITLE + frame.height + legend_height + 2 * MARGIN
    width, height = min(len(charts), COLUMNS) * cell_width, rows * cell_height
    cells = [
        f'<g transform="translate({i % COLUMNS * cell_width + MARGIN} {i // COLUMNS * cell_height + MARGIN})">'
        f"{_cell(chart, legend)}</g>"
        for i, (chart, legend) in enumerate(zip(charts, legends, strict=True))
    ]
    style = (files("megatron_dsrl.charts") / "templates" / "charts.css").read_text(encoding="utf-8")
    text = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">'
        f"<style>{style} text {{ font-family: system-ui, sans-serif; }}"
        " text.title { font-weight: 600; font-size: 14px; fill: var(--text); } text.entry { fill: var(--text); }"
        f" svg {{ background: var(--page); }} svg svg {{ width: {frame.width}px; height: {frame.height}px; }}"
        "</style>" + "".join(cells) + "</svg>\n"
    )
    write_result(path, text)


def _legend(chart: Chart) -> list[list[tuple[float, int, str]]]:
    """Rows of (x, colour, label): every curve's last value, and its step if that is not the chart's last."""
    at = f"{chart.source.horizontal.name} {chart.legend_step}:"
    left, right = chart.frame.left, chart.frame.width
    rows: list[list[tuple[float, int, str]]] = [[(left, 0, at)]]
    x = left + text_width(at) + BETWEEN
    for series in chart.source.series:
        label = _shortened(_last_value(chart, series), right - left - SWATCH)
        width = SWATCH + text_width(label)
        if x + width > right:
            rows.append([])
            x = left
        rows[-1].append((x, series.colour, label))
        x += width + BETWEEN
    return [row for row in rows if row]


def _last_value(chart: Chart, series: Series) -> str:
    known = series.known()
    if not known:
        return f"{series.name}: {number(None)}"
    step, value, error = known[-1]
    where = "" if step == chart.legend_step else f" at {chart.source.horizontal.name} {step}"
    return f"{series.name}: {number(value, error)}{where}"


def _shortened(label: str, room: float) -> str:
    """The label, with its middle cut out if it is too long for a row."""
    if text_width(label) <= room:
        return label
    half = int(len(label) * room / text_width(label)) // 2 - 1
    return f"{label[:half]}…{label[-half:]}"


def _cell(chart: Chart, legend: Sequence[Sequence[tuple[float, int, str]]]) -> str:
    frame, entries = chart.frame, []
    for row, row_entries in enumerate(legend):
        y = TITLE + frame.height + LEGEND_ROW * row
        for x, colour, label in row_entries:
            if colour:
                swatch = f'<rect class="series-{colour} dot" x="{x:.0f}" y="{y + 2}" width="10" height="10" rx="2"/>'
                entries.append(swatch)
            kind = ' class="entry"' if colour else ""
            entries.append(f'<text{kind} x="{x + (SWATCH if colour else 0):.0f}" y="{y + 11}">{escape(label)}</text>')
    drawing = str(chart.svg).replace("<svg ", f'<svg y="{TITLE}" width="{frame.width}" height="{frame.height}" ', 1)
    title = escape(chart.source.title)
    return f'<text class="title" x="{frame.left}" y="16">{title}</text>{drawing}{"".join(entries)}'
