"""Charts: scales, and that every value stands where the scale says."""

from __future__ import annotations

import json
import math
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from test_report_page import Outline
from tokenseg.report.charts import Axis, Dot, Line, Strip, axis_over, line_chart, scatter_chart, strip_chart
from tokenseg.report.curves import curves_section

FINITE = st.floats(-1e6, 1e6).map(lambda value: round(value, 3))
ROWS = [
    {"step": str(step), "loss": f"{2 / step}", "commitment": "0.1", "val_dice": f"{step / 20}" if step % 5 == 0 else ""}
    for step in range(1, 11)
]


@given(st.lists(FINITE, min_size=1), st.booleans())
def test_axis_covers_its_values_with_a_few_round_ticks(values, zero):
    axis = axis_over([*values, math.nan], "x", zero=zero)
    assert all(-1e-9 <= axis.share(value) <= 1 + 1e-9 for value in values)
    ticks = axis.ticks()
    assert 2 <= len(ticks) <= 7
    assert all(-1e-6 <= axis.share(tick) <= 1 + 1e-6 for tick in ticks)
    steps = np.diff(ticks)
    assert steps == pytest.approx(steps[0])
    if zero and min(values) >= 0:
        assert axis.low == 0


def test_logarithmic_axis_goes_from_power_to_power():
    axis = axis_over([0.03, 4.0], "loss", log=True)
    assert (axis.low, axis.high) == (pytest.approx(0.01), pytest.approx(10))
    assert axis.ticks() == pytest.approx([0.01, 0.1, 1, 10])
    assert axis.share(0.1) == pytest.approx(1 / 3)


def test_axis_over_nothing_is_usable():
    assert axis_over([math.nan], "x").ticks()


def points(svg: str, class_: str) -> list[tuple[float, float]]:
    text = re.search(rf'<polyline points="([^"]*)" class="{class_}">', svg)[1]
    return [tuple(map(float, point.split(","))) for point in text.split()]


def test_line_goes_through_the_values():
    line = Line("loss", np.arange(1.0, 5), np.array([4.0, 3, 2, 1]))
    chart = line_chart("Loss", [line], "loss")
    drawn = np.array(points(chart, "smooth"))
    assert np.diff(drawn[:, 0]) == pytest.approx(np.diff(drawn[:, 0])[0], abs=0.2)
    assert np.diff(drawn[:, 1]) == pytest.approx(np.diff(drawn[:, 1])[0], abs=0.2)
    assert np.diff(drawn[:, 1])[0] > 0  # downwards on the screen


def test_long_line_is_smoothed_over_its_extremes_and_read_out():
    steps = np.arange(1.0, 10_001)
    values = np.where(steps % 2 == 0, 1.0, 3.0)
    chart = line_chart("Loss", [Line("loss", steps, values)], "loss")
    smooth, raw = np.array(points(chart, "smooth")), np.array(points(chart, "raw"))
    assert len(smooth) == 200
    assert np.ptp(smooth[:, 1]) < 1  # the mean of 1 and 3 throughout
    assert raw[:, 1].min() < smooth[:, 1].mean() < raw[:, 1].max()
    readings = json.loads(Outline(chart).attributes("svg")[0]["data-lines"])
    assert readings["series"][0][0] == "loss"
    assert set(readings["series"][0][1]) == {2.0}
    assert len(readings["x"]) == len(readings["px"]) == 200


def test_lines_with_other_steps_read_out_nothing_where_they_have_none():
    lines = [Line("a", np.array([1.0, 2]), np.array([5.0, 6])), Line("b", np.array([2.0]), np.array([7.0]))]
    readings = json.loads(Outline(line_chart("t", lines, "y", smooth=False)).attributes("svg")[0]["data-lines"])
    assert readings["x"] == [1, 2]
    assert readings["series"] == [["a", [5, 6]], ["b", [None, 7]]]


def test_strip_puts_dots_by_value_and_keeps_them_apart():
    dots = [
        Dot(0.5, 0.0, "a", False),
        Dot(0.5, 0.0, "b", False),
        Dot(1.0, 0.0, "c", False),
        Dot(0.0, 0.0, "missed", True),
    ]
    chart = strip_chart("Dice", [Strip("tumour", dots, 0.5, 0.25, 0.75)], Axis(0.0, 1.0, "Dice"))
    circles = {each["data-tip"]: each for each in Outline(chart).attributes("circle")}
    assert set(circles) == {"a", "b", "c"}
    assert float(circles["a"]["cx"]) == float(circles["b"]["cx"])
    assert abs(float(circles["a"]["cy"]) - float(circles["b"]["cy"])) >= 7
    crosses = Outline(chart).attributes("path")
    assert [(each["class"], each["data-tip"]) for each in crosses] == [("dot failed", "missed")]
    left, right = float(crosses[0]["d"][1:].split()[0]) + 4, float(circles["c"]["cx"])
    assert float(circles["a"]["cx"]) == pytest.approx((left + right) / 2, abs=0.2)
    assert "mean 0.500, 95 % interval 0.250 to 0.750" in chart


@given(st.lists(st.floats(0, 1), max_size=300))
def test_strip_stays_in_its_row(values):
    dots = [Dot(value, 0.0, str(number), False) for number, value in enumerate(values)]
    chart = strip_chart("Dice", [Strip("tumour", dots, 0.5, 0.4, 0.6)], Axis(0.0, 1.0, "Dice"))
    places = [float(each["cy"]) for each in Outline(chart).attributes("circle")]
    assert len(places) == len(values)
    assert all(38 - 15 <= y <= 38 + 15 for y in places)


def test_strip_without_a_mean_says_so():
    nan = math.nan
    assert "no case scored" in strip_chart("Dice", [Strip("tumour", [], nan, nan, nan)], Axis(0.0, 1.0, "Dice"))


def test_scatter_puts_agreement_on_the_diagonal():
    groups = {"a": [Dot(2.0, 2.0, "same", False)], "b": [Dot(0.0, 4.0, "invented", True)]}
    outline = Outline(scatter_chart("Volume", groups, "x", "y"))
    diagonal = next(each for each in outline.attributes("line") if each["class"] == "agree")
    (dot,) = outline.attributes("circle")
    x1, y1, x2, y2 = (float(diagonal[name]) for name in ("x1", "y1", "x2", "y2"))
    share = (float(dot["cx"]) - x1) / (x2 - x1)
    assert 0 < share < 1
    assert float(dot["cy"]) == pytest.approx(y1 + share * (y2 - y1), abs=0.2)


def test_curves_draw_the_columns_that_have_values():
    section = curves_section(ROWS)
    titles = [text for text in Outline(section.body).texts if text in {"Loss", "Parts of the loss", "Validation Dice"}]
    assert titles == ["Loss", "Parts of the loss", "Validation Dice"]
    assert "Codebook" not in section.body
    dice = section.body[section.body.index("Validation Dice") :]
    assert dice.count("<circle") == 2  # steps 5 and 10


def test_curves_of_a_run_without_steps():
    assert "No step was logged." in curves_section([]).body
    assert "No step was logged." in curves_section([{"step": "1", "loss": "nan"}]).body
