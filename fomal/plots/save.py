"""Write a figure."""

from __future__ import annotations

import warnings
from pathlib import Path

from matplotlib.figure import Figure

from fomal.utils.files import atomic_replace


def save_figure(figure: Figure, path: Path, keep: bool = False) -> None:
    """Write a figure whole or not at all; its kind is that of the path, and its folder is made.

    Args:
        figure: the figure.
        path: where it belongs.
        keep: rename a file that is there rather than replace it.

    Raises:
        WriteError: the disk is full or read-only.
    """
    with atomic_replace(path, keep) as unfinished, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # a box is drawn; one for each letter
        figure.savefig(unfinished, dpi=150, format=path.suffix.removeprefix("."))
