"""Charts on disk as what they show, to be drawn again by a page that may look otherwise."""

from collections.abc import Sequence
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from megatron_dsrl.charts.chart_source import ChartSource
from megatron_dsrl.charts.charts import Chart, draw
from megatron_dsrl.common.errors import UserError

_SOURCES = TypeAdapter(list[ChartSource])


def write_charts(charts: Sequence[Chart], path: Path) -> None:
    """Write them as JSON."""
    path.write_bytes(_SOURCES.dump_json([chart.source for chart in charts]) + b"\n")


def read_charts(path: Path) -> list[Chart]:
    """
    Raises:
        UserError: the file holds no charts.
    """
    try:
        return [draw(source) for source in _SOURCES.validate_json(path.read_bytes())]
    except ValidationError as error:
        problem = error.errors()[0]["msg"]
        raise UserError(f"{path} does not hold charts: {problem}. Delete it, or run the analysis again") from error
