"""Final results against a setting, one panel for each setting, one line for each method."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import mean, pstdev

from matplotlib.figure import Figure

from fomal.evaluation.figures import Quantity
from fomal.plots.compare import INCHES_PER_CHARACTER, set_scale, style_of
from fomal.utils.output import plotted

Panel = Mapping[str, Mapping[float, tuple[float, float]]]
"""Method -> value of the setting -> mean and 95 % half-width."""


def sweep_figure(panels: Mapping[str, Panel], metric: Quantity, title: str = "") -> Figure:
    """One panel for each setting, with the same colour and marker for a method in all of them.

    Args:
        panels: name of the setting -> results; a method without any keeps its place in the order of colours.
        metric: what the results are of.
        title: above the panels.
    """
    scale = metric.scale
    places = {name: place for place, name in enumerate(dict.fromkeys(m for panel in panels.values() for m in panel))}
    shown = {name: panel for name, panel in panels.items() if any(panel.values())}
    width = 4.2 * len(shown) + 0.8
    figure = Figure(figsize=(width, 5), layout="constrained")
    handles = {}
    for ax, (name, panel) in zip(
        figure.subplots(1, len(shown), sharey=True, squeeze=False)[0], shown.items(), strict=True
    ):
        for method, points in panel.items():
            if points:
                x = sorted(points)
                y, half = ([scale * points[value][i] for value in x] for i in (0, 1))
                handles[method] = ax.errorbar(x, y, half, capsize=2, **(style_of(places[method]) | {"markersize": 5}))
        values = sorted({value for points in panel.values() for value in points})
        if is_geometric(values):
            ax.set_xscale("log")
        ax.set_xticks(values, [f"{value:g}" for value in values])
        ax.set_xticks([], minor=True)
        ax.set(xlabel=plotted(name))
        ax.grid(alpha=0.3)
    figure.axes[0].set(ylabel=plotted(f"test {metric.title}"))
    results = [final for panel in shown.values() for points in panel.values() for final in points.values()]
    set_scale(figure.axes[0], metric, [value for value, _ in results])
    figure.suptitle(plotted(title))
    names = [name for name in places if name in handles]
    columns = max(1, int(width / (INCHES_PER_CHARACTER * max(map(len, names)) + 0.7)))
    lines = math.ceil(len(names) / columns)
    figure.legend(
        [handles[name] for name in names],
        [plotted(name) for name in names],
        loc="outside lower center",
        ncols=math.ceil(len(names) / lines),
        fontsize="small",
        handlelength=3,
    )
    return figure


def is_geometric(values: Sequence[float]) -> bool:
    """Tell whether increasing values are spaced more evenly by their ratios than by their differences."""
    if len(values) < 3 or values[0] <= 0:
        return False
    gaps = [b - a for a, b in zip(values, values[1:], strict=False)]
    ratios = [math.log(b / a) for a, b in zip(values, values[1:], strict=False)]
    return pstdev(ratios) / mean(ratios) < pstdev(gaps) / mean(gaps)
