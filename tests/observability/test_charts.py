"""Charts: coordinates, holes and words."""

import json

from megatron_dsrl.observability.charts import PhaseSpan, Series, line_chart, number, stacked_chart, ticks


def test_ticks_are_round_and_cover_the_range() -> None:
    assert ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1]
    assert ticks(-0.018, 0.031) == [-0.02, -0.01, 0, 0.01, 0.02, 0.03, 0.04]
    assert ticks(0, 128) == [0, 50, 100, 150]


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
