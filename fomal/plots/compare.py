"""Learning curves and final results of several methods, side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence
from textwrap import fill
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from fomal.evaluation.figures import Quantity
from fomal.plots.runs import Method
from fomal.utils.output import plotted, shown

LINES = ("-", "--", ":", "-.")
MARKERS = "os^Dv<>pXP*h"
LEGEND_WIDTH = 45  # characters; longer labels are broken
INCHES_PER_CHARACTER = 0.075
NO_BREAK = "\u00a0"


def set_scale(axes: Axes, shown: Quantity, means: Sequence[float]) -> None:
    """Draw errors above 0 on a logarithmic scale, which ends below the means: intervals may reach below 0."""
    means = [mean for mean in means if not math.isnan(mean)]
    if shown.is_logarithmic and means and min(means) > 0:
        axes.set_yscale("log")
        axes.set_ylim(bottom=max(axes.get_ylim()[0], min(means) / 2))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(LogFormatter(labelOnlyBase=False, minor_thresholds=(1, 0.4)))


def style_of(place: int) -> dict[str, Any]:
    """Colour, line and marker of the method at a place of the legend: all different for sixty."""
    return {
        "color": colormaps["tab10"](place % 10),
        "linestyle": LINES[place % len(LINES)],
        "marker": MARKERS[place % len(MARKERS)],
        "markersize": 4,
    }


def compare_figure(methods: Sequence[Method], metric: str, title: str = "") -> Figure:
    """Validation curves with their 95 % bands; at the right the test results, with their intervals.

    A method without a curve, e.g. an untrained network, is a horizontal line.
    """
    shown_as = methods[0].quantity(metric)
    tested = [method for method in methods if method.final(metric) is not None]
    texts = [plotted(fill(_label(method, metric), LEGEND_WIDTH)) for method in methods]
    longest = max(len(line) for text in texts for line in text.splitlines())
    width = 6.8 + bool(tested) + INCHES_PER_CHARACTER * longest
    lines = sum(text.count("\n") + 1 for text in texts)
    figure = Figure(figsize=(width, max(4.8, 0.19 * lines + 0.8)), layout="constrained")
    ratios = [6.0, 1.0][: 1 + bool(tested)]
    axes, *ends = figure.subplots(1, len(ratios), sharey=True, squeeze=False, width_ratios=ratios)[0]
    for place, (method, text) in enumerate(zip(methods, texts, strict=True)):
        _draw_method(axes, method, metric, text, style_of(place))
        for end in ends:
            _draw_result(end, method, metric, place, style_of(place))
    axes.set(xlabel="meta-iterations", ylabel=plotted(shown_as.title), title="validation" if ends else "")
    if not any(method.curve(metric) for method in methods):
        axes.set(xlabel="", xticks=[], title="")
    for end in ends:
        end.set(title="test", xlim=(-1, len(methods)), xticks=[])
        end.grid(alpha=0.3)
    means = [mean for method in methods for _, mean, _ in method.curve(metric)]
    set_scale(axes, shown_as, [*means, *(final[0] for method in methods if (final := method.final(metric)))])
    axes.grid(alpha=0.3)
    figure.suptitle(plotted(title))
    heading = "test: mean ± 95 % interval over tasks" if tested else None
    figure.legend(loc="outside right upper", fontsize="small", handlelength=3, title=heading, title_fontsize="small")
    return figure


def _label(method: Method, metric: str) -> str:
    final = method.final(metric)
    if final is None:
        return shown(method.label)
    about = method.quantity(metric)
    mean, half = (f"{100 * value:.1f}" if about.unit == "%" else f"{value:.3g}" for value in final)
    text = mean if math.isnan(final[1]) else f"{mean} ± {half}"
    text += f" {about.unit}" if about.unit else ""
    return f"{shown(method.label)}: {text.replace(' ', NO_BREAK)}"


def _draw_method(axes: Axes, method: Method, metric: str, label: str, style: dict[str, Any]) -> None:
    """A curve with its band, or the test result where there is no curve."""
    scale, curve, final = method.quantity(metric).scale, method.curve(metric), method.final(metric)
    if not curve and final is None:
        return
    if not curve and final is not None:
        axes.axhline(scale * final[0], label=label, color=style["color"], linestyle=style["linestyle"])
        return
    steps = [step for step, _, _ in curve]
    mean, half = ([scale * point[i] for point in curve] for i in (1, 2))
    if len(steps) > 40:
        style = style | {"markevery": max(1, len(steps) // 20)}
    axes.plot(steps, mean, label=label, **style)
    low, high = ([m + sign * h for m, h in zip(mean, half, strict=True)] for sign in (-1, 1))
    axes.fill_between(steps, low, high, color=style["color"], alpha=0.12, linewidth=0)


def _draw_result(axes: Axes, method: Method, metric: str, place: int, style: dict[str, Any]) -> None:
    """The test result, each method beside the others, so that intervals that overlap can be told apart."""
    scale, final = method.quantity(metric).scale, method.final(metric)
    if final is not None:
        axes.errorbar(
            place, scale * final[0], scale * final[1], color=style["color"], marker=style["marker"], ms=5, capsize=2
        )
