"""Charts as one SVG file that stands alone: in a README, in light and in dark."""

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from markupsafe import escape

from megatron_dsrl.observability.chart_axes import HEIGHT, LEFT, WIDTH
from megatron_dsrl.observability.charts import Chart

COLUMNS = 3
TITLE, LEGEND_ROW, GAP = 22, 18, 16
CHARACTER = 6.2
"""Width of a legend's character, about."""


def write_figure(charts: Sequence[Chart], path: Path) -> None:
    """Write charts side by side, three in a row, with their titles and legends."""
    rows = -(-len(charts) // COLUMNS)
    legends = [_legend(chart) for chart in charts]
    legend_height = LEGEND_ROW * max(len(legend) for legend in legends)
    cell_width, cell_height = WIDTH + GAP, TITLE + HEIGHT + legend_height + GAP
    width, height = min(len(charts), COLUMNS) * cell_width, rows * cell_height
    cells = [
        f'<g transform="translate({i % COLUMNS * cell_width} {i // COLUMNS * cell_height})">{_cell(chart, legend)}</g>'
        for i, (chart, legend) in enumerate(zip(charts, legends, strict=True))
    ]
    style = (files("megatron_dsrl.observability") / "templates" / "style.css").read_text(encoding="utf-8")
    path.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">'
        f"<style>{style} text {{ font: 11px system-ui, sans-serif; fill: currentColor; }}"
        " text.title { font-weight: 600; font-size: 13px; } svg { color: var(--text); background: var(--page); }"
        f" svg svg {{ width: {WIDTH}px; height: {HEIGHT}px; }}"
        "</style>" + "".join(cells) + "</svg>\n",
        encoding="utf-8",
    )


def _legend(chart: Chart) -> list[list[tuple[float, int, str]]]:
    """Rows of (x, colour, label): the values at the last step, which the first row begins with."""
    at = f"{chart.source.horizontal.name} {chart.legend_step}:"
    rows: list[list[tuple[float, int, str]]] = [[(LEFT, 0, at)]]
    x = LEFT + 10 + CHARACTER * len(at)
    for colour, name, value in chart.legend:
        label = f"{name} {value}"
        width = 26 + CHARACTER * len(label)
        if x + width > WIDTH and x > LEFT:
            rows.append([])
            x = LEFT
        rows[-1].append((x, colour, label))
        x += width
    return rows


def _cell(chart: Chart, legend: Sequence[Sequence[tuple[float, int, str]]]) -> str:
    entries = []
    for row, row_entries in enumerate(legend):
        y = TITLE + HEIGHT + LEGEND_ROW * row
        for x, colour, label in row_entries:
            if colour:
                swatch = f'<rect class="series-{colour} dot" x="{x:.0f}" y="{y + 2}" width="10" height="10" rx="2"/>'
                entries.append(swatch)
            entries.append(f'<text x="{x + (14 if colour else 0):.0f}" y="{y + 11}">{escape(label)}</text>')
    drawing = str(chart.svg).replace("<svg ", f'<svg y="{TITLE}" width="{WIDTH}" height="{HEIGHT}" ', 1)
    return f'<text class="title" x="{LEFT}" y="14">{escape(chart.source.title)}</text>{drawing}{"".join(entries)}'
