"""A figure of what is left of outer gradients beyond their leading terms, against the inner step size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from fomal.plots.save import save_figure


def taylor_figure(
    alphas: Sequence[float], residuals: Mapping[str, Sequence[float]], slopes: Mapping[str, float]
) -> Figure:
    """One line per rule on logarithmic axes, its slope in the legend, and a guide of slope 2."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for index, (name, values) in enumerate(residuals.items()):
        style = ("-", "--", ":", "-.")[index % 4]
        axes.loglog(alphas, values, style, marker=".", label=f"{name}: slope {slopes[name]:.3f}")
    lowest = min(values[0] for values in residuals.values()) / 3
    axes.loglog(alphas, [lowest * (alpha / alphas[0]) ** 2 for alpha in alphas], color="grey", label="slope 2")
    axes.set(
        xlabel="inner step size α",
        ylabel="‖outer gradient - leading terms‖",
        title="Taylor residual of outer gradients",
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    return figure


def draw_taylor(
    path: Path, alphas: Sequence[float], residuals: Mapping[str, Sequence[float]], slopes: Mapping[str, float]
) -> None:
    """Draw `taylor_figure` into a file; its folder is made."""
    save_figure(taylor_figure(alphas, residuals, slopes), path, keep=True)
