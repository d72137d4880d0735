"""Charts: coordinates, holes and words."""

import json
import re
from xml.etree import ElementTree

import pytest

from megatron_dsrl.charts.chart_source import Series, StepAxis, ValueAxis, number, ticks
from megatron_dsrl.charts.charts import Chart, line_chart, read_charts, stacked_chart, text_width, write_charts
from megatron_dsrl.charts.figure import write_figure
from megatron_dsrl.common.errors import UserError
from megatron_dsrl.observability.run_records import PhaseSpan


def line(chart: Chart) -> str:
    """The path of the only curve."""
    return chart.svg.split('class="line series-1" d="')[1].split('"')[0]


def test_ticks_are_round_and_cover_the_range() -> None:
    assert ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1]
    assert ticks(-0.018, 0.031) == [-0.02, -0.01, 0, 0.01, 0.02, 0.03, 0.04]
    assert ticks(0, 128) == [0, 50, 100, 150]
    assert ticks(0, 3e-14) == [0, 1e-14, 2e-14, 3e-14]


def test_numbers_for_people() -> None:
    values = [0, 3, 0.68754, 1834.2, 2e-6, -0.00851, None]
    assert [number(v) for v in values] == ["0", "3", "0.688", "1,834", "2e-6", "-0.00851", "none"]


def test_a_missing_value_interrupts_the_curve_and_is_reported() -> None:
    series = Series("loss", (1, 2, 3, 4), (0.0, 1.0, None, 0.5), colour=1)
    chart = line_chart("Loss", "", [series], [PhaseSpan("warm", 1, 2, 1), PhaseSpan("main", 3, 4, 2)])
    # The drawing area spans x 58..388 and y 194 (value 0) .. 22 (value 1).
    assert line(chart) == "M58.0 194.0h0L168.0 22.0M388.0 108.0h0"
    data = json.loads(chart.data)
    assert data["series"] == [{"name": "loss", "values": [0, 1, None, 0.5]}]
    assert data["steps"] == {"from": 1, "to": 4} and data["phases"] == [["warm", 1, 2], ["main", 3, 4]]
    assert 'aria-label="Loss. loss: 0 at step 1, 0.5 at step 4, highest 1 at step 2."' in chart.svg


def test_stacked_areas_lie_on_each_other() -> None:
    chart = stacked_chart("Groups", "", [Series("a", (1, 2), (1, 2), 1), Series("b", (1, 2), (3, 2), 2)])
    areas = [part.split('"')[0] for part in chart.svg.split(' d="')[1:]]
    # The axis spans 0..4, so a unit is 43 high.
    assert areas[0] == "M58.0 151.0L388.0 108.0L388.0 194.0L58.0 194.0Z"
    assert areas[1] == "M58.0 22.0L388.0 22.0L388.0 108.0L58.0 151.0Z"


def test_names_are_escaped_in_the_drawing() -> None:
    assert "<b>" not in line_chart('"><b>', "", [Series('"><b>', (1,), (1.0,), 1)]).svg


def test_doubling_is_a_constant_distance_on_a_log2_axis() -> None:
    axis = StepAxis("K =", is_log2=True)
    chart = line_chart("Pass@K", "", [Series("a", (1, 2, 4, 6, 8), (0.0, 0.0, 0.0, 0.0, 1.0), 1)], horizontal=axis)
    places = [float(point.split()[0]) for point in line(chart)[1:].replace("h0", "").split("L")]
    assert places == [58.0, 168.0, 278.0, 342.3, 388.0]  # 6 lies at log2(6) = 2.585 of 3
    assert all(f">{k}</text>" in chart.svg for k in (1, 2, 4, 8)) and ">6</text>" not in chart.svg
    assert "a: 0 at K = 1, 1 at K = 8" in chart.svg
    wide = line_chart("", "", [Series("a", (1, 2**20), (0.0, 1.0), 1)], horizontal=axis)
    assert wide.svg.count('text-anchor="middle"') == 11 + 1  # every second power, and the axis's name


def test_charts_from_a_file_are_the_same_drawing(tmp_path) -> None:
    phases = [PhaseSpan("warm", 1, 1, 1), PhaseSpan("main", 2, 2, 2)]
    axes = ValueAxis("y", is_log=True), StepAxis("K", True)
    charts = [
        line_chart("L", "x", [Series("a", (1, 2), (0.5, None), 1, (0.1, None), (2,))], phases, *axes),
        stacked_chart("S", "y", [Series("a", (1, 2), (1, 2), 1), Series("b", (1, 2), (3, 2), 2)]),
    ]
    write_charts(charts, tmp_path / "two.charts.json")
    assert read_charts(tmp_path / "two.charts.json") == charts
    (tmp_path / "two.charts.json").write_text('[{"kind": "lines"}]')
    with pytest.raises(UserError, match="two.charts.json does not hold charts: Field required"):
        read_charts(tmp_path / "two.charts.json")


def test_a_curve_begins_again_where_its_meaning_changes() -> None:
    series = Series("loss", (1, 2, 3, 4), (0.0, 1.0, 0.0, 1.0), colour=1, breaks=(3,))
    assert line(line_chart("Loss", "", [series])) == "M58.0 194.0h0L168.0 22.0M278.0 194.0h0L388.0 22.0"


def test_small_and_large_values_are_visible_on_a_log_axis() -> None:
    series = Series("gap", (1, 2, 3, 4), (1e-7, 1e-6, 1e-5, 0.0), colour=1)
    chart = line_chart("Gap", "", [series], vertical=ValueAxis(is_log=True))
    assert line(chart) == "M58.0 194.0h0L168.0 108.0L278.0 22.0L388.0 194.0", "zero lies on the lower edge"
    assert all(f">{label}</text>" in chart.svg for label in ("1e-7", "1e-6", "1e-5"))
    nothing = line_chart("Gap", "", [Series("gap", (1,), (0.0,), 1)], vertical=ValueAxis(is_log=True))
    assert ">1</text>" in nothing.svg


def test_an_axis_ends_where_no_value_can_be() -> None:
    accuracy = ValueAxis("accuracy", at_least=0.0, at_most=1.0)
    low = Series("a", (1, 2), (0.01, 0.3), 1, errors=(0.1, 0.1))
    chart = line_chart("A", "", [low], vertical=accuracy)
    assert ">0</text>" in chart.svg and ">0.4</text>" in chart.svg and ">-" not in chart.svg
    high = line_chart("A", "", [Series("a", (1, 2), (0.5, 0.99), 1, errors=(0.1, 0.1))], vertical=accuracy)
    assert ">1</text>" in high.svg and ">1.2</text>" not in high.svg
    assert ">accuracy</text>" in chart.svg and ">step</text>" in chart.svg


def test_a_phase_is_named_where_it_begins_and_names_do_not_collide() -> None:
    series = Series("a", tuple(range(1, 51)), (0.5,) * 50, 1)
    phases = [PhaseSpan("NSR-PreRL", 1, 3, 1), PhaseSpan("GRPO", 4, 50, 2)]
    names = re.findall(r'<text x="([\d.]+)" y="12">([^<]+)</text>', line_chart("A", "", [series], phases).svg)
    (first, _), (second, _) = names
    assert [name for _, name in names] == ["NSR-PreRL", "GRPO"]
    assert float(second) - float(first) > 60 > 330 * 3 / 50, "the second name waits for the end of the first"


def test_a_long_run_is_drawn_with_as_many_points_as_can_be_seen() -> None:
    values = tuple(float(step == 2500) for step in range(5000))
    chart = line_chart("A", "", [Series("a", tuple(range(5000)), values, 1)])
    assert len(line(chart)) < 25_000 and " 22.0" in line(chart), "the peak of one step is kept"


def test_a_legend_stays_in_the_picture(tmp_path) -> None:
    names = ["WWWWWWWW method", "x" * 200, "GRPO"]
    chart = line_chart("A", "", [Series(name, (1, 2), (0.1, 0.512), 1, (0.1, 0.1)) for name in names])
    write_figure([chart], tmp_path / "a.svg")
    picture = ElementTree.parse(tmp_path / "a.svg").getroot()
    entries = [text for text in picture.iter("{http://www.w3.org/2000/svg}text") if text.get("class") == "entry"]
    assert [entry.text.split()[-1] for entry in entries] == ["0.1"] * 3
    assert all(float(entry.get("x")) + text_width(entry.text) <= float(picture.get("width")) for entry in entries)
