"""Curves and results of several methods in one figure."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from fomal.plots.compare import compare_figure, style_of
from fomal.plots.runs import Method, Run

CURVE = [(100, 0.5, 0.02), (200, 0.6, 0.01)]


def method(
    label: str, curve: bool = True, final: tuple[float, float] | None = (0.7, 0.03), metric: str = "accuracy"
) -> Method:
    return Method(label, [Run(Path(label), {}, {metric: CURVE} if curve else {}, {metric: final} if final else {})])


def test_the_figure_holds_curves_bands_and_results() -> None:
    found = [method("one"), method("two", final=None), method("none", curve=False, final=(0.2, 0.01))]
    figure = compare_figure(found, "accuracy", "title")
    axes, end = figure.axes
    lines = {line.get_label().replace("\u00a0", " "): line for line in axes.get_lines()}
    assert lines.keys() == {"one: 70.0 ± 3.0 %", "two", "none: 20.0 ± 1.0 %"}
    assert lines["one: 70.0 ± 3.0 %"].get_xydata().tolist() == [[100, 50], [200, 60]]
    assert lines["two"].get_xdata() == pytest.approx([100, 200])
    assert lines["none: 20.0 ± 1.0 %"].get_ydata() == pytest.approx([20, 20])
    corners = {tuple(c) for c in axes.collections[0].get_paths()[0].vertices.round(9).tolist()}
    assert {(100.0, 48.0), (100.0, 52.0), (200.0, 59.0), (200.0, 61.0)} <= corners
    results = [(bar[0].get_xydata().tolist(), bar[2][0].get_segments()[0].tolist()) for bar in end.containers]
    assert results[0] == ([[0, 70]], [[0, 67], [0, 73]])
    assert results[1][0] == [[2, pytest.approx(20)]]  # in the place of its method
    assert end.containers[0][0].get_color() == lines["one: 70.0 ± 3.0 %"].get_color()
    assert [axis.get_title() for axis in (axes, end)] == ["validation", "test"]
    assert axes.get_ylabel() == "accuracy, %"


def test_without_results_there_is_one_panel() -> None:
    assert len(compare_figure([method("one", final=None)], "accuracy").axes) == 1


def test_losses_are_logarithmic_and_intervals_below_0_do_not_stretch_the_axis() -> None:
    figure = compare_figure([method("one", final=(0.01, 0.02), metric="loss")], "loss")
    axes = figure.axes[0]
    assert axes.get_yscale() == "log"
    assert 0.005 <= axes.get_ylim()[0] < 0.01
    assert axes.get_lines()[0].get_ydata() == pytest.approx([0.5, 0.6])


def test_a_result_of_one_task_has_no_interval() -> None:
    figure = compare_figure([method("one", final=(0.2, math.nan))], "accuracy")
    assert figure.axes[0].get_lines()[0].get_label() == "one: 20.0\u00a0%"


def test_many_methods_have_styles_of_their_own() -> None:
    styles = [style_of(place) for place in range(30)]
    assert len({(s["color"], s["linestyle"], s["marker"]) for s in styles}) == 30
    assert len({s["color"] for s in styles[:10]}) == 10
    labels = [f"method {number} with a name of many words, and settings=[1, 2, 3]" for number in range(12)]
    figure = compare_figure([method(label) for label in labels], "accuracy")
    figure.draw_without_rendering()
    legend, axes = figure.legends[0].get_window_extent(), figure.axes[0].get_window_extent()
    assert legend.x0 > figure.axes[1].get_window_extent().x1  # beside the panels
    assert legend.y0 > 0
    assert axes.width > 400
