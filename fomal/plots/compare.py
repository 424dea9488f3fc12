"""Learning curves and final results of several runs, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib import colormaps
from matplotlib.figure import Figure

from fomal.plots.runs import Method

LINES = ("-", "--", ":", "-.")
MARKERS = "os^Dv<>pXP*h"


def scale_of(metric: str) -> tuple[float, str]:
    """The factor a figure is shown with, and its unit: accuracies are in per cent."""
    return (100.0, " %") if "accuracy" in metric else (1.0, "")


def style_of(place: int) -> dict[str, Any]:
    """Colour, line and marker of the method at a place of the legend: all different for ten and more."""
    return {
        "color": colormaps["tab10"](place % 10),
        "linestyle": LINES[place % len(LINES)],
        "marker": MARKERS[place % len(MARKERS)],
        "markersize": 4,
    }


def compare_figure(methods: Sequence[Method], metric: str, title: str = "") -> Figure:
    """Validation curves with their 95 % bands; at the right end the test results, with their intervals.

    A method without a curve, e.g. an untrained network, is a horizontal line.
    """
    scale, unit = scale_of(metric)
    figure = Figure(figsize=(9.5, 5), layout="constrained")
    axes = figure.subplots()
    last = max((step for method in methods for step, _, _ in method.curve(metric)), default=1)
    for place, method in enumerate(methods):
        style, curve, final = style_of(place), method.curve(metric), method.final(metric)
        label = method.label
        if final is not None:
            label += f" (test {scale * final[0]:.4g} ± {scale * final[1]:.2g}{unit})"
        if curve:
            steps = [step for step, _, _ in curve]
            mean, half = ([scale * point[i] for point in curve] for i in (1, 2))
            axes.plot(steps, mean, label=label, **style)
            low, high = ([m + sign * h for m, h in zip(mean, half, strict=True)] for sign in (-1, 1))
            axes.fill_between(steps, low, high, color=style["color"], alpha=0.15, linewidth=0)
        elif final is not None:
            axes.axhline(scale * final[0], label=label, color=style["color"], linestyle=style["linestyle"])
        if final is not None and curve:
            # Beside each other, so that intervals that overlap can be told apart.
            x = last * (1.03 + 0.12 * place / max(len(methods) - 1, 1))
            axes.errorbar(
                x,
                scale * final[0],
                scale * final[1],
                color=style["color"],
                marker=style["marker"],
                markersize=5,
                capsize=2,
            )
    axes.set(xlabel="meta-iterations (right: test)", ylabel=f"{metric}{',' if unit else ''}{unit}", title=title)
    if "loss" in metric:
        axes.set_yscale("log")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize="small")
    return figure
