"""Charts say with lengths what the numbers say."""

import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from vlmpipe.report import charts

HOSTILE = '<script>alert("x")</script>&'


def drawn(chart) -> ElementTree.Element:
    """The chart as a tree; a chart that is no well-formed XML fails here."""
    return ElementTree.fromstring(str(chart))


def numbers(element, *names: str) -> tuple[float, ...]:
    return tuple(float(element.get(name)) for name in names)


def of_class(tree, name: str) -> list:
    return [element for element in tree.iter() if name in (element.get("class") or "").split()]


def texts(tree) -> list[str]:
    return ["".join(element.itertext()) for element in tree.iter("text")]


def test_bars_of_the_funnel_are_as_long_as_their_counts():
    tree = drawn(charts.funnel([("pool", 1000, 0), ("small", 750, 250), ("clip", 250, 500)]))
    kept = [numbers(bar, "x", "width") for bar in of_class(tree, "keep")]
    lost = [numbers(bar, "x", "width") for bar in of_class(tree, "drop")]
    full = kept[0][1]
    assert [width / full for _, width in kept] == pytest.approx([1, 0.75, 0.25], abs=1e-3)
    assert [width / full for _, width in lost] == pytest.approx([0, 0.25, 0.5], abs=1e-3)
    assert [x for x, _ in lost] == pytest.approx([x + width for x, width in kept], abs=0.2)  # side by side
    assert texts(tree) == ["pool", "1,000", "small", "750 −250", "clip", "250 −500"]


def test_the_largest_numbers_and_longest_names_stay_inside_the_picture():
    tree = drawn(charts.funnel([("pool", 12_800_000, 0), ("evaluation overlap", 1_200_000, 11_600_000)]))
    for text in tree.iter("text"):
        x, length = float(text.get("x")), 6.5 * len("".join(text.itertext()))
        assert (x - length >= 0) if text.get("text-anchor") == "end" else (x + length <= charts.WIDTH)


def test_a_funnel_of_nothing_is_drawn():
    assert texts(drawn(charts.funnel([("pool", 0, 0)]))) == ["pool", "0"]


def test_histogram_bars_are_as_high_as_the_counts_and_kept_ones_stand_below():
    values = np.array([0.0] * 4 + [1.0] * 2 + [3.9999, 4.0])
    kept = np.array([True, True, True, False] + [False] * 2 + [True, False])
    tree = drawn(charts.histogram(values, kept, None, "score", bins=4))
    bars = {name: [numbers(bar, "x", "y", "height") for bar in of_class(tree, name)] for name in ("keep", "drop")}
    unit = bars["keep"][0][2] / 3
    assert [height / unit for _, _, height in bars["keep"]] == pytest.approx([3, 1], abs=0.01)
    assert [height / unit for _, _, height in bars["drop"]] == pytest.approx([1, 2, 1], abs=0.01)
    left, right = (bars["keep"][0], bars["drop"][0]), (bars["keep"][1], bars["drop"][2])
    for lower, upper in (left, right):
        assert lower[0] == upper[0] and upper[1] + upper[2] == pytest.approx(lower[1], abs=0.2)
    assert not of_class(tree, "threshold")
    assert texts(tree) == ["0", "2", "4", "score"]


@pytest.mark.parametrize("threshold, share", [(0.0, 0.0), (2.5, 0.25), (10.0, 1.0)])
def test_the_threshold_stands_where_its_value_is(threshold, share):
    tree = drawn(charts.histogram(np.linspace(0, 10, 50), np.ones(50, bool), threshold, "score"))
    (axis,), (line,) = of_class(tree, "axis"), of_class(tree, "threshold")
    left, right = numbers(axis, "x1", "x2")
    x, other = numbers(line, "x1", "x2")
    assert x == other == pytest.approx(left + share * (right - left), abs=0.1)
    label = next(text for text in tree.iter("text") if "threshold" in "".join(text.itertext()))
    assert (label.get("text-anchor") == "end") == (share > 0.5)  # never over the edge


def test_a_threshold_outside_the_values_is_not_drawn_at_a_wrong_place():
    tree = drawn(charts.histogram(np.linspace(0, 1, 9), np.ones(9, bool), 3.0, "score"))
    assert not of_class(tree, "threshold")


def test_what_is_not_finite_is_left_out_and_nothing_left_is_said():
    values = np.array([1.0, np.nan, np.inf, 1.0])
    tree = drawn(charts.histogram(values, np.array([True, True, True, False]), 1.0, "score", bins=2))
    assert len(of_class(tree, "keep")) == len(of_class(tree, "drop")) == 1
    assert charts.histogram(np.array([np.nan]), np.array([True]), None, "score") == "<p>no values</p>"


def test_curves_run_from_corner_to_corner():
    tree = drawn(charts.lines({"loss": [(0, 4.0), (50, 3.0), (100, 2.0)]}, "loss by step"))
    (curve,) = of_class(tree, "line")
    points = [tuple(map(float, point.split(","))) for point in curve.get("points").split()]
    vertical, horizontal = (numbers(axis, "x1", "y1", "x2", "y2") for axis in of_class(tree, "axis"))
    assert points[0][0] == horizontal[0] and points[2] == (horizontal[2], horizontal[3])
    assert points[1] == pytest.approx(((points[0][0] + points[2][0]) / 2, (points[0][1] + points[2][1]) / 2), abs=0.1)
    assert vertical[1] <= points[0][1] < points[2][1]
    assert texts(tree) == ["4", "2", "0", "100", "loss by step"]


def test_several_curves_are_named_and_a_lost_number_makes_a_gap_only():
    tree = drawn(charts.lines({"a": [(0, 1.0), (1, np.nan), (2, 3.0)], "b": [(0, 2.0), (2, 2.0)], "c": [(0, 9.0)]}, ""))
    assert [len(curve.get("points").split()) for curve in of_class(tree, "line")] == [2, 2]
    assert "nan" not in ElementTree.tostring(tree, "unicode")
    assert {"a", "b"} <= set(texts(tree)) and "c" not in texts(tree)
    assert charts.lines({"a": [(0, 1.0)]}, "loss") == charts.lines({}, "loss") == "<p>no curve</p>"


def test_smoothing_is_a_moving_average():
    tree = drawn(charts.lines({"loss": [(x, float(x % 2)) for x in range(10)]}, "loss", smooth=2))
    (curve,) = of_class(tree, "line")
    heights = {point.split(",")[1] for point in curve.get("points").split()}
    assert len(curve.get("points").split()) == 9 and len(heights) == 1


def test_an_interval_is_a_point_between_its_ends_on_a_scale():
    tree = drawn(charts.interval(0.5, 0.25, 1.5, limit=0.75))
    (axis,), (whisker,), (dot,), (tick,) = (of_class(tree, n) for n in ("axis", "whisker", "dot", "threshold"))
    start, end = numbers(axis, "x1", "x2")

    def place(share):
        return pytest.approx(start + share * (end - start), abs=0.1)

    assert float(dot.get("cx")) == place(0.5) and numbers(whisker, "x1", "x2") == (place(0.25), place(1.0))
    assert numbers(tick, "x1") == (place(0.75),)


def test_differences_stand_on_one_scale_with_their_zero_and_limits():
    rows = [charts.Difference("a", 0.1, 0.0, 0.2, -0.1, "good"), charts.Difference("b", -0.3, -0.4, -0.2, 0.1, "bad")]
    tree = drawn(charts.forest(rows, "difference"))
    whiskers, dots = of_class(tree, "whisker"), of_class(tree, "dot")
    zero, limits = of_class(tree, "zero"), of_class(tree, "threshold")
    start, end = numbers(whiskers[1], "x1")[0], numbers(whiskers[0], "x2")[0]  # -0.4 and 0.2

    def place(number):
        return pytest.approx(start + (number + 0.4) / 0.6 * (end - start), abs=0.1)

    assert numbers(whiskers[0], "x1") == (place(0.0),) and numbers(whiskers[1], "x2") == (place(-0.2),)
    assert [float(dot.get("cx")) for dot in dots] == [place(0.1), place(-0.3)]
    assert [numbers(line, "x1")[0] for line in zero] == [place(0.0)] * 2
    assert [numbers(line, "x1")[0] for line in limits] == [place(-0.1), place(0.1)]
    assert [dot.get("class") for dot in dots] == ["dot good", "dot bad"]
    assert {"a", "+0.1 [+0, +0.2]", "b", "-0.3 [-0.4, -0.2]", "-0.4", "0", "+0.2", "difference"} == set(texts(tree))


def test_a_difference_of_nothing_is_drawn_and_long_names_leave_room_for_the_numbers():
    tree = drawn(charts.forest([charts.Difference("question_type = " + "long " * 30, 0.0, 0.0, 0.0)], "difference"))
    label = next(text for text in texts(tree) if text.startswith("question_type"))
    assert label.endswith("…") and len(label) + len("+0 [+0, +0]") <= charts.WIDTH / charts.LETTER
    assert not of_class(tree, "threshold") and texts(tree).count("0") == 1


def test_names_in_charts_are_text():
    for chart in (
        charts.funnel([(HOSTILE, 2, 1)]), charts.histogram(np.arange(3.0), np.ones(3, bool), None, HOSTILE),
        charts.lines({HOSTILE: [(0, 1), (1, 2)], "b": [(0, 1), (1, 2)]}, HOSTILE),
        charts.forest([charts.Difference("a", 0.0, 0.0, 0.0)], HOSTILE),
    ):
        assert HOSTILE in texts(drawn(chart)) and "<script" not in chart
