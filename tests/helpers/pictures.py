"""Small image files for tests of datasets that are read from files."""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image


def picture(name: str, height: int = 8, width: int = 8) -> np.ndarray:
    """Random pixels (height, width, 3) that depend on the name."""
    return np.random.default_rng(zlib.crc32(name.encode())).integers(0, 256, (height, width, 3), np.uint8)


def encoded(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    """The content of an image file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def write_images(root: Path, folders: Mapping[str, int], height: int = 8, width: int = 8) -> Path:
    """PNG files 00.png, 01.png, ... in each folder, as many as it says, every one another; returns `root`."""
    for folder, count in folders.items():
        (root / folder).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            name = f"{folder}/{number:02}.png"
            (root / name).write_bytes(encoded(picture(name, height, width)))
    return root


def zipped(folder: Path, archive: Path) -> Path:
    """A zip of what is in `folder`, with members for its folders; returns `archive`."""
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as out:
        for path in sorted(folder.rglob("*")):
            out.write(path, path.relative_to(folder))
    return archive
