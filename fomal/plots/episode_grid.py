"""A task of image classification: support images, queries and what is predicted for them."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray
from torch import Tensor

from fomal.plots.save import save_figure
from fomal.tasks.episode import Episode

CLASSES = 20  # at most so many rows
_LABEL, _GAP, _ROW = 0.9, 0.5, 1.3  # in widths of an image: the classes' names, between the sets, from row to row
_INCH = 0.95  # of an image
_MARGIN = 0.1  # inches
_LINE = 0.17  # inches, of small text


def is_image(x: object) -> bool:
    """Tell whether examples (T, S, *input) are grey or RGB images."""
    return isinstance(x, Tensor) and x.ndim == 5 and x.shape[2] in (1, 3) and min(x.shape[3:]) > 1


def draw_episode(path: Path, episode: Episode, logits: Tensor, title: str, shown: int = 5) -> None:
    """Draw the first task of an episode: a row for each class, with support images left and queries right.

    Each query has a tick or a cross, the class predicted where that is wrong, and the prediction's probability.

    Args:
        path: image file to write; its folder is made.
        episode: with images (T, S, 1 or 3, H, W) as they are stored: integers to 255, or floating point, which is
            stretched to its range unless it is in [0, 1].
        logits: (Q, ways) of the queries.
        title: what the task is.
        shown: at most so many support images, and so many queries, of each class.
    """
    support, query = _pixels(episode.support_x[0].cpu(), episode.query_x[0].cpu())
    support_y, query_y = episode.support_y[0].cpu(), episode.query_y[0].cpu()
    probability, prediction = logits.cpu().float().softmax(-1).max(-1)  # (Q,) each
    rows = range(min(episode.ways, CLASSES))
    left, right = ([(y == label).nonzero().flatten().tolist()[:shown] for label in rows] for y in (support_y, query_y))
    start = _LABEL + max(map(len, left)) + _GAP  # of the queries
    width, height = start + max(1, *map(len, right)), _ROW * len(rows)
    count = int((prediction == query_y).sum())
    notes = [f"{count} of {len(query_y)} queries right, each forwarded by itself (non-transductive)"]
    notes += _left_out(episode.ways, (left, len(support_y)), (right, len(query_y)))
    axes = _axes(width, height, title, notes)
    axes.text(_LABEL, 0.02, "support", fontsize=9, weight="bold")
    axes.text(start, 0.02, "query", fontsize=9, weight="bold")
    for row, (examples, queries) in enumerate(zip(left, right, strict=True)):
        top = _ROW * row + _ROW - 1
        axes.text(_LABEL - 0.1, top + 0.5, f"class {row}", fontsize=8, ha="right", va="center")
        for place, index in enumerate(examples):
            _image(axes, support[index], _LABEL + place, top)
            _frame(axes, _LABEL + place, top, edgecolor="0.75", linewidth=0.8)
        for place, index in enumerate(queries):
            _image(axes, query[index], start + place, top)
            _mark(axes, start + place, top, row, int(prediction[index]), float(probability[index]))
    save_figure(axes.get_figure(root=True), path)  # type: ignore[arg-type] # it has one


def _axes(width: float, height: float, title: str, notes: list[str]) -> Axes:
    """Axes in widths of an image, (0, 0) at the upper left, below a title and notes."""
    inches = max(width * _INCH, 4.5) + 2 * _MARGIN
    lines = [line for note in notes for line in textwrap.wrap(note, int(inches * 16))]
    above = 0.35 + _LINE * len(lines) + 0.2  # inches
    total = above + height * _INCH + 2 * _MARGIN
    figure = Figure(figsize=(inches, total))
    figure.text(_MARGIN / inches, 1 - _MARGIN / total, title, fontsize=11, va="top")
    for number, line in enumerate(lines):
        y = 1 - (0.35 + _LINE * number) / total
        figure.text(_MARGIN / inches, y, line, fontsize=8, va="top", color="0.3")
    axes = figure.add_axes(
        (_MARGIN / inches, _MARGIN / total, width * _INCH / inches, height * _INCH / total),
        xlim=(0, width),
        ylim=(height, 0),
    )
    axes.set_axis_off()
    return axes


def _image(axes: Axes, pixels: NDArray[np.uint8], x: float, y: float) -> None:
    tall, wide = pixels.shape[:2]
    half = 0.46 * np.array([wide, tall]) / max(wide, tall)
    extent = (x + 0.5 - half[0], x + 0.5 + half[0], y + 0.5 + half[1], y + 0.5 - half[1])
    axes.imshow(pixels, cmap="gray", vmin=0, vmax=255, extent=extent, aspect="auto", interpolation="nearest")


def _mark(axes: Axes, x: float, y: float, truth: int, prediction: int, probability: float) -> None:
    right = prediction == truth
    colour = "tab:green" if right else "tab:red"
    _frame(axes, x, y, edgecolor=colour, linewidth=1.2 if right else 2.2, linestyle="-" if right else "--")
    text = f"✓ {100 * probability:.0f} %" if right else f"✗ class {prediction}, {100 * probability:.0f} %"
    axes.text(x + 0.5, y - 0.03, text, fontsize=6.5, ha="center", va="bottom", color=colour)


def _frame(axes: Axes, x: float, y: float, **style: Any) -> None:
    axes.add_patch(Rectangle((x + 0.02, y + 0.02), 0.96, 0.96, fill=False, **style))


def _left_out(ways: int, *parts: tuple[list[list[int]], int]) -> list[str]:
    """A note of what there was no room for."""
    missing = [
        f"{total - sum(map(len, drawn))} of {total} {what}"
        for what, (drawn, total) in zip(("support images", "queries"), parts, strict=True)
        if sum(map(len, drawn)) < total
    ]
    if ways > CLASSES:
        missing.append(f"{ways - CLASSES} of {ways} classes")
    return [f"not shown: {', '.join(missing)}"] if missing else []


def _pixels(*parts: Tensor) -> list[NDArray[np.uint8]]:
    """Images (N, C, H, W) of several sets as (N, H, W) or (N, H, W, 3) uint8, on one scale."""
    values = torch.cat([x.flatten() for x in parts]).float().nan_to_num()
    low, high = float(values.min()), float(values.max())
    if parts[0].dtype == torch.uint8 and high > 1:
        low, high = 0.0, 255.0
    elif low >= 0 and high <= 1:
        low, high = 0.0, 1.0
    scaled = [((x.float().nan_to_num() - low) / max(high - low, 1e-12) * 255).round().to(torch.uint8) for x in parts]
    return [(x[:, 0] if x.shape[1] == 1 else x.permute(0, 2, 3, 1)).numpy() for x in scaled]
