"""Pass@K over the budget K, whose doubling is a constant distance."""

from collections.abc import Mapping

from megatron_dsrl.observability.chart_axes import StepAxis
from megatron_dsrl.observability.charts import Chart, Series, line_chart

BUDGET = StepAxis("K =", is_log2=True)


def pass_at_k_chart(title: str, curves: Mapping[str, Mapping[int, float]]) -> Chart:
    """One curve per name, at most `SERIES_COLOURS`.

    Args:
        title: of the chart.
        curves: Pass@K by K ascending, by name.
    """
    series = [
        Series(name, tuple(values), tuple(values.values()), colour)
        for colour, (name, values) in enumerate(curves.items(), start=1)
    ]
    return line_chart(title, "Unbiased estimate, mean over problems.", series, top=1.0, horizontal=BUDGET)
