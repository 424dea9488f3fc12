"""Learning curves: validation figures over meta-iterations, with their intervals."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from fomal.plots.save import save_figure
from fomal.utils.output import plotted

Curve = list[tuple[int, float, float]]


def read_curves(files: Sequence[Path]) -> dict[str, Curve]:
    """Validation figures from one or several `metrics.csv` files, of a run and its resumptions.

    Returns:
        Name -> (meta-iteration, mean, 95 % half-width), in order; where files overlap the later file counts.
    """
    points: dict[str, dict[int, tuple[float, float]]] = {}
    for path in files:
        with Path(path).open(newline="") as file:
            for row in csv.DictReader(file):
                for name in row:
                    if name.startswith("val/") and not name.endswith("_ci95") and row[name]:
                        interval = float(row.get(f"{name}_ci95") or "nan")
                        points.setdefault(name, {})[int(row["step"])] = (float(row[name]), interval)
    return {name: [(step, *value) for step, value in sorted(curve.items())] for name, curve in points.items()}


def draw_curve(files: Sequence[Path], out: Path) -> bool:
    """Draw accuracies, or losses on a logarithmic scale; return whether there was anything to draw."""
    curves = read_curves(files)
    accuracies = {name: curve for name, curve in curves.items() if "accuracy" in name}
    losses = {name: curve for name, curve in curves.items() if "loss" in name}
    shown, scale = (accuracies, 100.0) if accuracies else (losses, 1.0)
    if not shown:
        return False
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, curve in sorted(shown.items()):
        steps = [step for step, _, _ in curve]
        mean = [scale * value for _, value, _ in curve]
        half = [scale * interval for _, _, interval in curve]
        (line,) = axes.plot(
            steps, mean, marker="." if len(steps) < 50 else None, label=plotted(name.removeprefix("val/"))
        )
        low, high = ([m + sign * h for m, h in zip(mean, half, strict=True)] for sign in (-1, 1))
        axes.fill_between(steps, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
    ylabel = "validation accuracy, %" if accuracies else "validation loss"
    axes.set(xlabel="meta-iterations", ylabel=ylabel, title="Learning curve (bands: 95 % interval over tasks)")
    if not accuracies:
        axes.set_yscale("log")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    save_figure(figure, out)
    return True
