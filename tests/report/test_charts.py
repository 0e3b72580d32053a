"""Curves: the moving average, what is not drawn, ticks, thinning, and what the SVG holds."""

import json
import math
import re

import pytest

from flowalign.report.charts import POINTS, Panel, curves, moving_average
from flowalign.report.line_chart import log_ticks, ticks
from flowalign.storage.metrics_log import Row

PANEL = Panel("Loss", "loss/x", "loss/spread", log=True)


def rows_of(values: list[float | None]) -> list[Row]:
    return [{"step": step, "loss/x": value} for step, value in enumerate(values, 1)]


def test_the_average_is_adams() -> None:
    assert moving_average([2.0, 2.0, None, 2.0]) == [2.0, 2.0, None, 2.0]  # no bias towards 0
    first, second = moving_average([1.0, 0.0])
    assert (first, second) == (pytest.approx(1.0), pytest.approx(0.09 / 0.19))


@pytest.mark.parametrize(("values", "text"), [
    ([0.5], "0.5 in the only iteration"), ([0.0] * 50, "0 in all 50 iterations"), ([-2.0, -2.0], "−2 in all 2 iterations"),
    ([1.0, None, 1.0], "1 in 2 of 3 iterations, not a number in the others"),
])  # fmt: skip
def test_a_curve_that_never_moves_is_a_sentence(values: list[float | None], text: str) -> None:
    found = curves({"": rows_of(values)}, [PANEL])
    assert (found.drawn, found.constant) == ([], [f"Loss: {text}"])


def test_nothing_known_is_nothing_said() -> None:
    assert (
        not curves({"": rows_of([None, None])}, [PANEL]) and not curves({"": []}, [PANEL]) and not curves({}, [PANEL])
    )


def test_if_one_run_moves_all_are_drawn() -> None:
    found = curves({"still": rows_of([1.0, 1.0]), "moving": rows_of([1.0, 2.0])}, [PANEL])
    assert found.constant == [] and len(json.loads(found.drawn[0].points)["lines"]) == 2
    assert found.drawn[0].head == ["iteration", "still", "moving"]


def test_a_gap_breaks_the_line_and_few_values_are_not_smoothed() -> None:
    [chart] = curves({"": rows_of([1.0, 2.0, None, 4.0, 5.0])}, [PANEL]).drawn
    assert len(re.findall('<path class="raw"', chart.svg)) == 2 and "smooth" not in chart.svg
    assert chart.table[2] == ["3", "–"]
    [chart] = curves({"": rows_of([float(n) for n in range(20)])}, [PANEL]).drawn
    assert chart.svg.count("raw behind") == chart.svg.count('class="smooth"') == 1


def test_the_axis_is_logarithmic_if_the_panel_says_so_and_the_values_allow_it() -> None:
    def log(values: list[float | None], panel: Panel = PANEL) -> bool:
        return curves({"": rows_of(values)}, [panel]).drawn[0].log

    assert (
        log([1e-6, 1e-3])
        and not log([1.0, 20.0])
        and not log([0.0, 1e3])
        and not log([1, 1e3], Panel("Loss", "loss/x"))
    )
    [chart] = curves({"": rows_of([1e-6, 1e-4, 1e-2])}, [PANEL]).drawn
    heights = [float(y) for y in re.findall(r'cy="([0-9.]+)"', chart.svg)]
    assert heights[0] - heights[1] == pytest.approx(heights[1] - heights[2], abs=0.2)  # equal factors, equal distances


def test_what_falls_by_factors_is_smoothed_by_factors() -> None:
    """An average of the values themselves would stay with the largest, far above the line."""
    [chart] = curves({"": rows_of([10.0**-n for n in range(20)])}, [PANEL]).drawn
    smooth = json.loads(chart.points)["lines"][0]["smooth"]
    expected = moving_average([float(-n) for n in range(20)])
    assert [math.log10(value) for value in smooth] == pytest.approx(expected, abs=1e-3)


def test_spikes_survive_thinning() -> None:
    values: list[float | None] = [math.sin(n) for n in range(5000)]
    values[1234], values[3000] = 50.0, -50.0
    line = json.loads(curves({"": rows_of(values)}, [PANEL]).drawn[0].points)["lines"][0]
    assert (
        len(line["x"]) <= POINTS and max(line["y"]) == 50 and min(line["y"]) == -50 and line["x"] == sorted(line["x"])
    )


def test_the_table_is_short_and_has_both_ends() -> None:
    [chart] = curves({"": rows_of([float(n) for n in range(1000)])}, [PANEL]).drawn
    assert len(chart.table) == 20 and chart.table[0][0] == "1" and chart.table[-1][0] == "1000"


@pytest.mark.parametrize(("low", "high", "texts"), [
    (0.0, 1.0, ["0.0", "0.5", "1.0"]), (-0.1, 0.1, ["−0.10", "−0.05", "0.00", "0.05", "0.10"]), (1, 51, ["20", "40"]),
    (1e-6, 4e-6, ["1e−6", "2e−6", "3e−6", "4e−6"]), (0.0, 3e5, ["0", "1e5", "2e5", "3e5"]),
])  # fmt: skip
def test_ticks(low: float, high: float, texts: list[str]) -> None:
    found = ticks(low, high, 4)
    assert [text for _, text in found] == texts and all(low <= value <= high * (1 + 1e-9) for value, _ in found)


def test_log_ticks() -> None:
    assert [text for _, text in log_ticks(2e-8, 2e-5)] == ["1e−7", "1e−6", "1e−5"]
    assert len(log_ticks(1e-12, 1e3)) <= 5


def test_a_band_is_drawn_around_one_run_only() -> None:
    rows = [{"step": step, "loss/x": float(step), "loss/spread": 0.5} for step in (1, 2, 3)]
    assert "band" in curves({"": rows}, [PANEL]).drawn[0].svg
    assert "band" not in curves({"a": rows, "b": rows}, [PANEL]).drawn[0].svg


def test_a_thinned_line_begins_and_ends_where_the_whole_one_does() -> None:
    rows = [{"step": step, "x": [3.0, 5.0, 0.0, 2.0][step % 4]} for step in range(1, 1800)]  # ends between its extremes
    [chart] = curves({"a": rows}, [Panel("x", "x")]).drawn
    [line] = json.loads(chart.points)["lines"]
    assert (line["x"][0], line["x"][-1], len(line["x"]) <= 600) == (1, 1799, True)
    assert "from 5 to 2, between 0 and 5" in chart.svg
