"""Learning curves: validation figures over meta-iterations, with their intervals."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fomal.evaluation.figures import Quantity, read_figures
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


def draw_curve(files: Sequence[Path], out: Path, figures: Mapping[str, Any] | None = None) -> bool:
    """Draw the figures that have a direction, a panel for each metric; return whether there was anything to draw.

    Args:
        files: see `read_curves`.
        out: the image file.
        figures: how they are shown, see `read_figures`; None: as `metrics.json` beside the last file says.
    """
    curves = read_curves(files)
    if figures is None and files:
        figures = read_about(Path(files[-1]).parent)
    shown = read_figures(figures, curves, str(out))
    metrics = dict.fromkeys(one.metric for one in shown.values() if one.higher_is_better is not None)
    if not metrics:
        return False
    figure = Figure(figsize=(7, 4.5 * len(metrics)), layout="constrained")
    for axes, metric in zip(figure.subplots(len(metrics), sharex=True, squeeze=False)[:, 0], metrics, strict=True):
        _draw_metric(axes, {one: curves[name] for name, one in shown.items() if one.metric == metric})
    figure.axes[-1].set(xlabel="meta-iterations")
    figure.axes[0].set(title="Learning curve (bands: 95 % interval over tasks)")
    save_figure(figure, out)
    return True


def _draw_metric(axes: Axes, curves: Mapping[Quantity, Curve]) -> None:
    """Draw the figures of one metric."""
    for shown, curve in sorted(curves.items(), key=lambda item: item[0].name):
        steps = [step for step, _, _ in curve]
        mean = [shown.scale * value for _, value, _ in curve]
        half = [shown.scale * interval for _, _, interval in curve]
        (line,) = axes.plot(steps, mean, marker="." if len(steps) < 50 else None, label=plotted(shown.name))
        low, high = ([m + sign * h for m, h in zip(mean, half, strict=True)] for sign in (-1, 1))
        axes.fill_between(steps, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
    first = next(iter(curves))
    axes.set(ylabel=plotted(f"validation {replace(first, name=first.metric).title}"))
    if first.is_logarithmic and all(value > 0 for curve in curves.values() for _, value, _ in curve):
        axes.set_yscale("log")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")


def read_about(folder: Path) -> Any:
    """Read what a run's `metrics.json` says of the figures in its log, see `read_figures`; None: nothing.

    Raises:
        ValueError: it is damaged.
    """
    path = folder / "metrics.json"
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}. Delete it: figures are then without units.") from error
