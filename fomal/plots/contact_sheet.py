"""A sheet of images with their predicted classes."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure
from torch import Tensor

from fomal.utils.output import plotted

SHOWN = 64
_COLUMNS = 8


def contact_sheet(images: Tensor, labels: Sequence[str], probabilities: Tensor, truth: Sequence[str | None]) -> Figure:
    """Draw images with their predicted class and its probability; wrong ones in red, with the true class.

    Args:
        images: (Q, C, H, W) uint8.
        labels: the predicted class of each.
        probabilities: (Q,) of it.
        truth: the true class of each, where it is known.
    """
    columns = min(_COLUMNS, len(images))
    rows = -(-len(images) // columns)
    figure = Figure(figsize=(1.5 * columns, 1.75 * rows), layout="constrained")
    for place, axes in enumerate(figure.subplots(rows, columns, squeeze=False).flat):
        axes.set_axis_off()
        if place >= len(images):
            continue
        image = images[place].permute(1, 2, 0).numpy()
        axes.imshow(image if image.shape[-1] == 3 else image[..., 0], cmap="gray", vmin=0, vmax=255)
        wrong = truth[place] is not None and truth[place] != labels[place]
        title = f"{_short(labels[place])} {100 * float(probabilities[place]):.0f} %"
        axes.set_title(
            f"{title}\n(is {_short(str(truth[place]))})" if wrong else title,
            fontsize=8,
            color="tab:red" if wrong else "black",
        )
    return figure


def _short(label: str) -> str:
    """The end of a long name, since paths differ there."""
    label = plotted(label)
    return label if len(label) <= 16 else f"…{label[-15:]}"
