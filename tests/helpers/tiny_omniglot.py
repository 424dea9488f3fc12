"""Twelve characters in the folders and files of Omniglot."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

from fomal.data.omniglot import SIDE

TINY = {  # characters of each alphabet
    "images_background": {"Beta": 3, "Alpha_(old)": 4},
    "images_evaluation": {"Delta": 2, "Gamma": 3},
}
DRAWINGS = 4


def png(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format=kind)
    return buffer.getvalue()


def write_folders(root: Path) -> Path:
    rng = np.random.default_rng(0)
    for part, alphabets in TINY.items():
        for alphabet, characters in alphabets.items():
            for character in range(characters, 0, -1):  # not in the order they must come out
                folder = root / part / alphabet / f"character{character:02}"
                folder.mkdir(parents=True)
                for drawing in range(DRAWINGS, 0, -1):
                    (folder / f"{drawing:02}.png").write_bytes(png(rng.random((SIDE, SIDE)) < 0.8))
    return root
