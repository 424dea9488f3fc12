"""Final results against a setting, one panel for each setting, one line for each method."""

from __future__ import annotations

from collections.abc import Mapping

from matplotlib.figure import Figure

from fomal.plots.compare import scale_of, style_of

Panel = Mapping[str, Mapping[float, tuple[float, float]]]
"""Method -> value of the setting -> mean and 95 % half-width."""


def sweep_figure(panels: Mapping[str, Panel], metric: str, title: str = "") -> Figure:
    """One panel for each setting, with the same colour and marker for a method in all of them."""
    scale, unit = scale_of(metric)
    figure = Figure(figsize=(4 * len(panels) + 1, 5), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    places: dict[str, int] = {}
    for ax, (name, panel) in zip(axes, panels.items(), strict=True):
        for method, points in panel.items():
            place = places.setdefault(method, len(places))
            x = sorted(points)
            y, half = ([scale * points[value][i] for value in x] for i in (0, 1))
            label = method if ax is axes[0] or all(method not in p for p in panels.values() if p is not panel) else None
            ax.errorbar(x, y, half, label=label, capsize=2, **style_of(place))
        values = sorted({value for points in panel.values() for value in points})
        if len(values) > 2 and values[0] > 0 and values[-1] / values[0] >= 4:
            ax.set_xscale("log")
        ax.set_xticks(values, [f"{value:g}" for value in values], minor=False)
        ax.set_xticks([], minor=True)
        ax.set(xlabel=name)
        ax.grid(alpha=0.3)
    axes[0].set(ylabel=f"test {metric}{',' if unit else ''}{unit}")
    figure.suptitle(title)
    figure.legend(loc="outside lower center", ncols=3, fontsize="small")
    return figure
