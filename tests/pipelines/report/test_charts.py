"""Charts are well-formed SVG whatever the points are, inside their frame, with names as text."""

from __future__ import annotations

import math
from itertools import pairwise
from xml.etree import ElementTree as ET

import pytest

from pipelines.core import quantity
from pipelines.report import charts, pareto
from pipelines.report.charts import Axis, Series
from pipelines.report.pareto import Model

STEP, LOSS = Axis("step"), Axis("loss, nats")
NAN = math.nan


def parse(svg: str) -> ET.Element:
    assert "nan" not in svg.lower()
    assert "inf" not in svg.lower()
    return ET.fromstring(svg)


def pixels(root: ET.Element) -> list[list[tuple[float, float]]]:
    """Return the corners of each polyline."""
    return [
        [tuple(map(float, pair.split(","))) for pair in line.get("points", "").split()]  # type: ignore[misc]
        for line in root.iter("polyline")
    ]


def test_a_rising_curve_goes_right_and_up() -> None:
    root = parse(charts.lines([Series("a", [(1, 1.0), (2, 2.0), (3, 4.0)])], STEP, LOSS, "t"))
    [line] = pixels(root)
    assert [x for x, _ in line] == sorted(x for x, _ in line)
    assert [y for _, y in line] == sorted((y for _, y in line), reverse=True)
    assert line[1][0] == pytest.approx((line[0][0] + line[2][0]) / 2, abs=0.1)


def test_one_point_is_a_dot() -> None:
    root = parse(charts.lines([Series("a", [(5, 2.5)])], STEP, LOSS, "t"))
    assert len(list(root.iter("circle"))) == 1
    assert not list(root.iter("polyline"))


@pytest.mark.parametrize("points", [[], [(1, None)], [(1, NAN), (2, math.inf)]])
def test_no_point_at_all_says_so(points: list[charts.Point]) -> None:
    root = parse(charts.lines([Series("a", points)], STEP, LOSS, "t"))
    assert "no points" in {element.text for element in root.iter("text")}


def test_gaps_part_the_curve() -> None:
    points = [(1, 1.0), (2, 2.0), (3, NAN), (4, 1.0), (5, None), (6, 3.0), (7, 4.0)]
    root = parse(charts.lines([Series("a", points)], STEP, LOSS, "t"))
    assert [len(line) for line in pixels(root)] == [2, 2]
    assert len(list(root.iter("circle"))) == 1  # step 4 stands alone


def test_equal_steps_of_a_logarithmic_axis_are_equal_ratios() -> None:
    points = [(1, 0.01), (10, 0.1), (100, 1.0)]
    [line] = pixels(parse(charts.lines([Series("a", points)], Axis("x", log=True), Axis("y", log=True), "t")))
    (x0, y0), (x1, y1), (x2, y2) = line
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)
    assert y1 - y0 == pytest.approx(y2 - y1, abs=0.2)


def test_values_of_zero_and_below_are_gaps_on_a_logarithmic_axis() -> None:
    points = [(1, 1.0), (2, 2.0), (3, 0.0), (4, -1.0), (5, 1.0), (6, 2.0)]
    root = parse(charts.lines([Series("a", points)], STEP, Axis("y", log=True), "t"))
    assert [len(line) for line in pixels(root)] == [2, 2]


def test_names_are_escaped() -> None:
    name = '</text><script>"&'
    two = [Series(name, [(1, 1.0), (2, 2.0)]), Series("b", [(1, 1.0)])]
    model = Model(name, 10.0, 1.0, 0.9, 1.1)
    pictures = [
        charts.lines(two, Axis(name), Axis(name), name),
        charts.bars([(name, 1.0)], name, quantity.duration),
        pareto.draw([model], [(name, 2.0)], Axis(name, log=True), Axis(name), name),
    ]
    for svg in pictures:
        root = parse(svg)
        assert not list(root.iter("script"))
        assert any(name in (element.text or "") for element in root.iter("text"))
        assert root.get("aria-label") == name


def test_a_legend_names_every_curve_and_wraps() -> None:
    series = [Series(f"a rather long name {n}", [(1, n), (2, n)]) for n in range(6)]
    root = parse(charts.lines(series, STEP, LOSS, "t"))
    keys = [element for element in root.iter("text") if element.get("class") == "key"]
    assert [key.text for key in keys] == [s.name for s in series]
    assert len({key.get("y") for key in keys}) > 1
    plot = min(y for line in pixels(root) for _, y in line)
    assert max(float(key.get("y", "")) for key in keys) < plot


def test_thinning_keeps_extremes_and_order() -> None:
    points: list[charts.Point] = [(x, math.sin(x / 50)) for x in range(10_000)]
    points[5_003] = (5_003, 40.0)
    points[7_001] = (7_001, -40.0)
    kept = charts.thin(points, 400)
    assert len(kept) <= 400
    assert (5_003, 40.0) in kept
    assert (7_001, -40.0) in kept
    assert kept == sorted(kept)
    assert charts.thin(points[:400], 400) == points[:400]


def test_thinning_keeps_a_long_gap() -> None:
    points: list[charts.Point] = [(x, None if 3_000 <= x < 4_000 else 1.0) for x in range(10_000)]
    assert any(y is None for _, y in charts.thin(points, 400))


def test_bars_are_as_long_as_their_values() -> None:
    root = parse(charts.bars([("a", 1.0), ("b", 3.0), ("c", 0.0)], "t", quantity.duration))
    a, b, c = (float(bar.get("width", "")) for bar in root.iter("rect"))
    assert b == pytest.approx(3 * a, abs=0.2)
    assert 0 < c <= 1


# ---- size against quality ---------------------------------------------------------------------------------------


def test_the_frontier_is_whom_nobody_beats() -> None:
    sizes_and_values = [(1, 5.0), (2, 3.0), (2, 4.0), (3, 3.0), (4, 2.0)]
    models = [Model(str(i), s, v, v, v) for i, (s, v) in enumerate(sizes_and_values)]
    assert pareto.frontier(models) == {"0", "1", "4"}


def test_models_equal_in_both_are_both_on_the_frontier() -> None:
    assert pareto.frontier([Model("a", 1, 1.0, 1, 1), Model("b", 1, 1.0, 1, 1)]) == {"a", "b"}


@pytest.mark.parametrize("count", [1, 2, 6])
def test_labels_of_a_crowd_lie_apart(count: int) -> None:
    models = [Model(f"gptq-int{n}-group64", 1e6 * (1 + n / 50), 2.0 + n / 500, 1.9, 2.1) for n in range(count)]
    root = parse(pareto.draw(models, [("gzip", 3.0)], Axis("size", log=True), Axis("bits"), "t"))
    labels = [element for element in root.iter("text") if (element.get("class") or "").startswith("name")]
    boxes = [(float(e.get("x", "")), float(e.get("y", ""))) for e in labels]
    assert len(boxes) == count
    for index, (x, y) in enumerate(boxes):
        assert all(abs(y - b) >= 12 or abs(x - a) >= 6 * len("gptq-int0-group64") for a, b in boxes[:index])


def test_baselines_are_lines_with_labels_apart() -> None:
    levels = [("gzip", 3.0), ("xz", 3.001), ("order1", 3.002), ("order2", NAN)]
    root = parse(pareto.draw([Model("a", 1e6, 2.0, 1.9, 2.1)], levels, Axis("size", log=True), Axis("bits"), "t"))
    heights = sorted(float(e.get("y", "")) for e in root.iter("text") if e.get("class") == "key")
    assert len(heights) == 3
    assert all(b - a >= 15.9 for a, b in pairwise(heights))


def test_the_chosen_model_wears_a_ring() -> None:
    models = [Model("a", 1, 1.0, 0.9, 1.1), Model("b", 2, 2.0, 1.9, 2.1, chosen=True)]
    root = parse(pareto.draw(models, [], Axis("size"), Axis("bits"), "t"))
    kinds = [circle.get("class") for circle in root.iter("circle")]
    assert kinds == ["filled", "ring", "hollow"]


def test_a_smoothed_curve_stands_before_its_raw_points() -> None:
    raw: list[charts.Point] = [(step, 5.0 + (-1) ** step) for step in range(300)]
    raw[100] = (100, NAN)
    smoothed = charts.smooth(raw)
    assert [x for x, _ in smoothed] == [x for x, _ in raw]
    assert smoothed[100][1] is None, "a gap stays a gap"
    assert all(y is None or abs(y - 5.0) < 0.35 for _, y in smoothed), "from +-1 to the ends' half windows"
    root = parse(charts.lines([Series("a", smoothed, raw=raw)], STEP, LOSS, "t"))
    kinds = [(line.get("class") or "").split()[0] for line in root.iter("polyline")]
    assert kinds == ["raw", "raw", "curve", "curve"]


def test_the_break_of_an_axis_is_drawn_and_said() -> None:
    models = [Model(name, 1e6, value, value - 0.004, value + 0.004) for name, value in (("a", 2.21), ("b", 2.22))]
    far = parse(pareto.draw(models, [("gzip", 3.0)], Axis("size", log=True), Axis("bits"), "t"))
    near = parse(pareto.draw(models, [], Axis("size", log=True), Axis("bits"), "t"))
    assert [len([t for t in root.iter("text") if "not to scale" in (t.text or "")]) for root in (far, near)] == [1, 0]
