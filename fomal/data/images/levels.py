"""Pixels of more than 8 bits: which of their values become black, and which white."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

ValueRange = int | tuple[float, float] | Literal["image"] | None
"""Bits, a window of the darkest and the brightest value, the values of each image, or what the kind of file allows."""

# Tags: bits per sample, photometric interpretation, planar configuration, sample format.
_TIFF_BITS, _TIFF_INK, _TIFF_PLANES, _TIFF_SIGNED = 258, 262, 284, 339
_ROWS = 256  # converted at once; bounds memory
_OTHER_BYTE = {  # of a 16-bit sample, the raw mode that takes the byte which Pillow leaves out
    **{f"{mode};16B": f"{mode};16L" for mode in ("RGB", "RGBA")},
    **{f"{mode};16L": f"{mode};16B" for mode in ("RGB", "RGBA")},
    **{f"{mode};16N": f"{mode};16{'B' if sys.byteorder == 'little' else 'L'}" for mode in ("RGB", "RGBA")},
}


class OutOfRange(ValueError):
    """Pixels that no range is known for."""


@dataclass(frozen=True)
class Deep:
    """An image of more than 8 bits.

    Attributes:
        values: (H, W) or (H, W, 3), integers or floating-point numbers.
        bits: that the values have; None for floating point.
        alpha: (H, W) uint8, 255 where it is opaque; None where all of it is.
        inverted: whether the smallest value is white.
    """

    values: NDArray[Any]
    bits: int | None
    alpha: NDArray[np.uint8] | None = None
    inverted: bool = False

    def peak(self) -> float:
        """The largest value."""
        return float(self.values.max())

    def reduced(self, value_range: ValueRange) -> Image.Image:
        """The image in 8 bits: mode L or RGB, or RGBA where it has alpha.

        Raises:
            OutOfRange: without a `value_range`, the values are floating-point, negative or of more than 16 bits; or
                some are NaN or infinite.
        """
        low, high = self._limits(value_range)
        pixels = np.empty(self.values.shape, np.uint8)
        for first in range(0, len(pixels), _ROWS):
            part = self.values[first : first + _ROWS].astype(np.float64)
            share = 256 * (part - low) / (high - low) if high > low else np.zeros_like(part)
            pixels[first : first + _ROWS] = share.clip(0, 255)
        image = Image.fromarray(255 - pixels if self.inverted else pixels)
        if self.alpha is not None:
            image = image.convert("RGBA")
            image.putalpha(Image.fromarray(self.alpha))
        return image

    def _limits(self, value_range: ValueRange) -> tuple[float, float]:
        """The value that becomes 0, and the one that would become 256."""
        smallest, largest = self.values.min(), self.values.max()
        if not (math.isfinite(smallest) and math.isfinite(largest)):
            raise OutOfRange("has pixels that are NaN or infinite")
        if value_range == "image":
            return float(smallest), float(largest)
        if isinstance(value_range, int):
            return 0, 2**value_range
        if value_range is not None:
            return value_range
        if self.bits is None:
            raise OutOfRange("floating-point pixels, whose range is not defined: set value_range")
        bits = min(self.bits, 16)
        if smallest < 0 or largest >= 2**bits:
            raise OutOfRange(f"pixels from {smallest} to {largest}, not of {bits} bits: set value_range")
        return 0, 2**bits


def checked(value_range: Any) -> ValueRange:
    """The range, a window as a tuple; ValueError for anything else."""
    window = isinstance(value_range, list | tuple) and len(value_range) == 2
    if window and all(isinstance(value, int | float) and abs(value) < 1e300 for value in value_range):
        low, high = value_range
        if low < high:
            return float(low), float(high)
    elif value_range in (None, "image") or (type(value_range) is int and 1 <= value_range <= 32):
        kept: ValueRange = value_range
        return kept
    raise ValueError(
        f"value_range={value_range!r} is no range of values: give bits (1 to 32), [darkest, brightest] or image."
    )


def deep_image(image: Image.Image, again: Callable[[], Image.Image] | None = None) -> Deep | None:
    """The image's own values, where it has more than 8 bits; None where it has not.

    Args:
        image: not loaded yet, unless of mode I or F.
        again: opens it once more. Of 16-bit colours Pillow gives one byte; without `again` they are not seen.
    """
    if image.mode == "F" or image.mode.startswith("I"):
        return _one_channel(image)
    _refuse_planes(image)
    raw = {_raw_mode(tile) for tile in getattr(image, "tile", ())}
    if again is None or not any(";16" in mode for mode in raw):
        return None
    if raw == {"LA;16B"}:
        with again() as other:
            # Four bytes a pixel, as they are: two of the grey and two of the alpha.
            four = np.asarray(_with_raw_mode(other, "RGBA"))
        return Deep(four[..., 0].astype(np.int32) << 8 | four[..., 1], 16, four[..., 2])
    if len(raw) != 1 or not raw <= _OTHER_BYTE.keys():
        return None  # CMYK and the like, of which Pillow's byte is used
    with again() as other:
        lower = np.asarray(_with_raw_mode(other, _OTHER_BYTE[raw.pop()]))
    values = np.asarray(image).astype(np.int32) << 8 | lower
    color, alpha = values[..., :3], (values[..., 3] >> 8).astype(np.uint8) if values.shape[2] == 4 else None
    clear = image.info.get("transparency")
    if isinstance(clear, tuple):
        alpha = np.where((color == clear).all(-1), 0, 255).astype(np.uint8)
    return Deep(color, 16, alpha)


def deep_array(array: NDArray[Any]) -> Deep:
    """An array (H, W), (H, W, 3) or, with alpha of 16 bits, (H, W, 4) that is not uint8."""
    kind, alpha = array.dtype, None
    if array.shape[2:] == (4,):
        array, alpha = array[..., :3], (array[..., 3].astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)
    return Deep(array, None if kind.kind == "f" else 16, alpha)


def _one_channel(image: Image.Image) -> Deep:
    image.load()
    values = np.asarray(image)
    tags: Any = getattr(image, "tag_v2", {}) if getattr(image, "format", None) == "TIFF" else {}
    bits = int(tags.get(_TIFF_BITS, (16,))[0])
    if bits == 32 and tags.get(_TIFF_SIGNED, (1,))[0] == 1 and values.dtype == np.int32:
        values = values.view(np.uint32)
    clear = image.info.get("transparency")
    alpha = None if clear is None else np.where(values == clear, 0, 255).astype(np.uint8)
    return Deep(values, None if image.mode == "F" else bits, alpha, tags.get(_TIFF_INK) == 0)


def _refuse_planes(image: Image.Image) -> None:
    """Of separate planes of 16 bits, Pillow takes bytes for samples, or gives the upper bytes alone."""
    tags: Any = getattr(image, "tag_v2", {})
    if tags.get(_TIFF_PLANES) == 2 and len(tags.get(_TIFF_BITS, ())) > 1 and max(tags[_TIFF_BITS]) > 8:
        raise OutOfRange("16-bit colours in separate planes: store them pixel by pixel")


def _raw_mode(tile: Any) -> str:
    args = tile[3]
    found = args if isinstance(args, str) else args[0] if args else ""
    return found if isinstance(found, str) else ""


def _with_raw_mode(image: Any, mode: str) -> Any:
    image.tile = [
        tile._replace(args=mode if isinstance(tile.args, str) else (mode, *tile.args[1:])) for tile in image.tile
    ]
    return image
