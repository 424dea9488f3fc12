"""A figure of how a regression task is learnt, step by step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from fomal.plots.save import save_figure


def draw_adaptation(
    path: Path,
    x: Sequence[float],
    truth: Sequence[float],
    support: tuple[Sequence[float], Sequence[float]],
    predictions: Mapping[int, Sequence[float]],
) -> None:
    """Draw the true function, the support points and the predictions after some numbers of steps.

    Args:
        path: image file to write; its folder is made.
        x: where the functions are evaluated.
        truth: the true values there.
        support: x and y of the support points.
        predictions: number of inner steps -> values predicted at `x`.
    """
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(x, truth, color="black", linewidth=2, label="true function")
    shades = (index / max(len(predictions) - 1, 1) for index in range(len(predictions)))
    for (steps, values), shade in zip(predictions.items(), shades, strict=True):
        label = "before adaptation" if steps == 0 else f"after {steps} step{'s' if steps > 1 else ''}"
        style = "--" if steps == 0 else "-"
        axes.plot(x, values, style, color=(0.15 + 0.7 * shade, 0.45 - 0.2 * shade, 0.85 - 0.7 * shade), label=label)
    axes.plot(*support, "o", color="black", markersize=7, markerfacecolor="gold", label="support points")
    axes.set(xlabel="x", ylabel="y", title="Adaptation to a validation task")
    axes.legend(fontsize="small")
    save_figure(figure, path)
