"""Results against the settings that are swept."""

from __future__ import annotations

import pytest

from fomal.evaluation.figures import Quantity
from fomal.plots.sweep import is_geometric, sweep_figure

PANELS = {
    "inner steps": {
        "none yet": {},
        "Reptile": {2: (0.5, 0.1), 4: (0.6, 0.1), 8: (0.7, 0.1)},
        "FOMAML": {2: (0.6, 0.1)},
    },
    "shots": {"none yet": {}, "Reptile": {}, "FOMAML": {1: (0.4, 0.1), 2: (0.5, 0.1), 3: (0.5, 0.1)}},
    "not run yet": {"none yet": {}, "Reptile": {}, "FOMAML": {}},
}


def test_a_sweep_has_a_panel_for_each_setting_and_a_style_for_each_method() -> None:
    figure = sweep_figure(PANELS, Quantity("accuracy", "accuracy", "%", True))
    first, second = figure.axes
    drawn = [[c[0].get_xydata().tolist() for c in axes.containers] for axes in figure.axes]
    assert drawn == [[[[2, 50], [4, 60], [8, 70]], [[2, 60]]], [[[1, 40], [2, 50], [3, 50]]]]
    assert first.containers[0][2][0].get_segments()[0].tolist() == [[2, 40], [2, pytest.approx(60)]]
    fomaml = [first.containers[1][0], second.containers[0][0]]
    assert fomaml[0].get_color() == fomaml[1].get_color() != first.containers[0][0].get_color()
    assert fomaml[0].get_marker() == fomaml[1].get_marker() != first.containers[0][0].get_marker()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["Reptile", "FOMAML"]
    assert [(axes.get_xlabel(), axes.get_xscale()) for axes in figure.axes] == [
        ("inner steps", "log"),
        ("shots", "linear"),
    ]
    assert first.get_ylabel() == "test accuracy, %"
    figure.draw_without_rendering()
    assert [tick.get_text() for tick in first.get_xticklabels()] == ["2", "4", "8"]


def test_losses_are_logarithmic() -> None:
    figure = sweep_figure({"a": {"Reptile": {1: (0.01, 0.1), 2: (1.0, 0.1)}}}, Quantity("loss", "loss", "", False))
    assert figure.axes[0].get_yscale() == "log"
    assert 0.005 <= figure.axes[0].get_ylim()[0] < 0.01


@pytest.mark.parametrize(
    ("values", "geometric"),
    [
        ([2, 5, 10, 20], True),
        ([5, 10, 25], True),
        ([0.25, 1, 4], True),
        ([1, 2, 3, 4], False),
        ([0, 1, 10], False),
        ([1, 100], False),
        ([], False),
    ],
)
def test_geometric_values(values: list[float], geometric: bool) -> None:
    assert is_geometric(values) is geometric
