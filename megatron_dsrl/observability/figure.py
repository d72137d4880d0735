"""Charts as one SVG file that stands alone: in a README, in light and in dark."""

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from markupsafe import escape

from megatron_dsrl.observability.charts import HEIGHT, WIDTH, Chart

COLUMNS = 3
TITLE, LEGEND, GAP = 22, 18, 16


def write_figure(charts: Sequence[Chart], path: Path) -> None:
    """Write charts side by side, three in a row, with their titles and legends."""
    rows = -(-len(charts) // COLUMNS)
    cell_width, cell_height = WIDTH + GAP, TITLE + HEIGHT + LEGEND + GAP
    width, height = min(len(charts), COLUMNS) * cell_width, rows * cell_height
    cells = [
        f'<g transform="translate({i % COLUMNS * cell_width} {i // COLUMNS * cell_height})">{_cell(chart)}</g>'
        for i, chart in enumerate(charts)
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


def _cell(chart: Chart) -> str:
    entries, x = [], 46
    for colour, name, value in chart.legend:
        label = f"{name} {value}"
        entries.append(
            f'<rect class="series-{colour} dot" x="{x}" y="{TITLE + HEIGHT + 2}" width="10" height="10" rx="2"/>'
            f'<text x="{x + 14}" y="{TITLE + HEIGHT + 11}">{escape(label)}</text>'
        )
        x += 28 + 7 * len(label)
    drawing = str(chart.svg).replace("<svg ", f'<svg y="{TITLE}" width="{WIDTH}" height="{HEIGHT}" ', 1)
    return f'<text class="title" x="46" y="14">{escape(chart.title)}</text>{drawing}{"".join(entries)}'
