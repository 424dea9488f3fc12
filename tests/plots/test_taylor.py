from __future__ import annotations

from fomal.plots.taylor import taylor_figure


def test_the_figure_shows_each_rule_and_its_slope() -> None:
    figure = taylor_figure([0.1, 1.0], {"Reptile": [0.01, 1.0], "MAML": [0.02, 2.0]}, {"Reptile": 2.0, "MAML": 1.99})
    (axes,) = figure.axes
    lines = {line.get_label(): line.get_ydata().tolist() for line in axes.get_lines()}
    assert lines["Reptile: slope 2.000"] == [0.01, 1.0]
    assert lines["MAML: slope 1.990"] == [0.02, 2.0]
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
