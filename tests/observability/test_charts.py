"""Charts: coordinates, holes and words."""

import json

import pytest

from megatron_dsrl.errors import UserError
from megatron_dsrl.observability.chart_axes import StepAxis, ticks
from megatron_dsrl.observability.chart_file import read_charts, write_charts
from megatron_dsrl.observability.charts import PhaseSpan, Series, line_chart, number, stacked_chart


def test_ticks_are_round_and_cover_the_range() -> None:
    assert ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1]
    assert ticks(-0.018, 0.031) == [-0.02, -0.01, 0, 0.01, 0.02, 0.03, 0.04]
    assert ticks(0, 128) == [0, 50, 100, 150]
    assert ticks(0, 3e-14) == [0, 1e-14, 2e-14, 3e-14]


def test_numbers_for_people() -> None:
    values = [0, 3, 0.68754, 1834.2, 2e-6, -0.00851, None]
    assert [number(v) for v in values] == ["0", "3", "0.688", "1,834", "2e-6", "-0.00851", "none"]


def test_a_missing_value_interrupts_the_curve_and_is_said() -> None:
    series = Series("loss", (1, 2, 3, 4), (0.0, 1.0, None, 0.5), colour=1)
    chart = line_chart("Loss", "", [series], [PhaseSpan("warm", 1, 2, 1), PhaseSpan("main", 3, 4, 2)])
    path = chart.svg.split('class="line series-1" d="')[1].split('"')[0]
    # The drawing area spans x 46..388 and y 186 (value 0) .. 14 (value 1).
    assert path == "M46.0 186.0h0L160.0 14.0M388.0 100.0h0"
    assert json.loads(chart.data)["series"] == [["0", "1", "none", "0.5"]]
    assert json.loads(chart.data)["phases"] == ["warm", "warm", "main", "main"]
    assert 'aria-label="Loss. loss: 0 at step 1, 0.5 at step 4, highest 1 at step 2."' in chart.svg


def test_stacked_areas_lie_on_each_other() -> None:
    chart = stacked_chart("Groups", "", [Series("a", (1, 2), (1, 2), 1), Series("b", (1, 2), (3, 2), 2)])
    areas = [part.split('"')[0] for part in chart.svg.split(' d="')[1:]]
    # The axis spans 0..4, so a unit is 43 high.
    assert areas[0] == "M46.0 143.0L388.0 100.0L388.0 186.0L46.0 186.0Z"
    assert areas[1] == "M46.0 14.0L388.0 14.0L388.0 100.0L46.0 143.0Z"


def test_names_are_escaped_in_the_drawing() -> None:
    assert "<b>" not in line_chart('"><b>', "", [Series('"><b>', (1,), (1.0,), 1)]).svg


def test_doubling_is_a_constant_distance_on_a_log2_axis() -> None:
    axis = StepAxis("K =", is_log2=True)
    chart = line_chart("Pass@K", "", [Series("a", (1, 2, 4, 6, 8), (0.0, 0.0, 0.0, 0.0, 1.0), 1)], horizontal=axis)
    path = chart.svg.split('class="line series-1" d="')[1].split('"')[0]
    places = [float(point.split()[0]) for point in path[1:].replace("h0", "").split("L")]
    assert places == [46.0, 160.0, 274.0, 340.7, 388.0]  # 6 lies at log2(6) = 2.585 of 3
    assert all(f">{k}</text>" in chart.svg for k in (1, 2, 4, 8)) and ">6</text>" not in chart.svg
    assert "a: 0 at K = 1, 1 at K = 8" in chart.svg
    wide = line_chart("", "", [Series("a", (1, 2**20), (0.0, 1.0), 1)], horizontal=axis)
    assert wide.svg.count("text-anchor=\"middle\"") == 11  # every second power


def test_charts_from_a_file_are_the_same_drawing(tmp_path) -> None:
    phases = [PhaseSpan("warm", 1, 1, 1), PhaseSpan("main", 2, 2, 2)]
    charts = [
        line_chart("L", "x", [Series("a", (1, 2), (0.5, None), 1, (0.1, None))], phases, 1.0, StepAxis("K", True)),
        stacked_chart("S", "y", [Series("a", (1, 2), (1, 2), 1), Series("b", (1, 2), (3, 2), 2)]),
    ]
    write_charts(charts, tmp_path / "two.charts.json")
    assert read_charts(tmp_path / "two.charts.json") == charts
    (tmp_path / "two.charts.json").write_text('[{"kind": "lines"}]')
    with pytest.raises(UserError, match="two.charts.json does not hold charts: Field required"):
        read_charts(tmp_path / "two.charts.json")
