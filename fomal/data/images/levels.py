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
_COLORS = ("RGB", "RGBA", "RGBX", "CMYK")
_OTHER_BYTE = {  # of a 16-bit sample, the raw mode that takes the byte which Pillow leaves out
    **{f"{mode};16B": f"{mode};16L" for mode in _COLORS},
    **{f"{mode};16L": f"{mode};16B" for mode in _COLORS},
    **{f"{mode};16N": f"{mode};16{'B' if sys.byteorder == 'little' else 'L'}" for mode in _COLORS},
}
_WHITE = 65535  # of 16 bits
_CODESTREAM = b"\xff\x4f\xff\x51"  # how that of JPEG 2000 begins


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

    Raises:
        OutOfRange: Pillow cannot give all of its bits.
    """
    if image.mode == "F" or image.mode.startswith("I"):
        return _one_channel(image)
    _refuse_what_loses_bits(image)
    if again is None:
        return None
    if getattr(image, "format", None) == "PPM":
        return _netpbm(image, again)
    raw = {_raw_mode(tile) for tile in getattr(image, "tile", ())}
    if not any(";16" in mode for mode in raw):
        return None
    if raw == {"LA;16B"}:
        with again() as other:
            # Four bytes a pixel, as they are: two of the grey and two of the alpha.
            four = np.asarray(_with_raw_mode(other, "RGBA"))
        return Deep(four[..., 0].astype(np.int32) << 8 | four[..., 1], 16, four[..., 2])
    if len(raw) != 1 or not raw <= _OTHER_BYTE.keys():
        raise OutOfRange(f"16-bit colours stored as {' and '.join(sorted(raw))}: store them as PNG, without alpha")
    with again() as other:
        lower = np.asarray(_with_raw_mode(other, _OTHER_BYTE[raw.pop()]))
    values = np.asarray(image).astype(np.int32) << 8 | lower
    if image.mode == "CMYK":
        light = _WHITE - values.astype(np.int64)
        return Deep(light[..., :3] * light[..., 3:] // _WHITE, 16)
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


def _netpbm(image: Any, again: Callable[[], Any]) -> Deep | None:
    """The colours of a PPM file of 16 bits, of which Pillow would give 8; its brightest value becomes 65535."""
    codec, *_, args = image.tile[0]
    if image.mode != "RGB" or not isinstance(args, tuple) or args[-1] < 256:
        return None
    if codec != "ppm":
        raise OutOfRange("16-bit colours written as text (P3): store them as PNG, TIFF or binary PPM (P6)")
    parts = []
    for mode in ("RGB;16B", "RGB;16L"):
        with again() as other:
            place: Any = other.tile[0]
            other.tile = [place._replace(codec_name="raw", args=(mode, 0, 1))]
            parts.append(np.asarray(other).astype(np.int64))
    values = (parts[0] << 8 | parts[1]).clip(0, args[-1])
    return Deep((values * _WHITE + args[-1] // 2) // args[-1], 16)


def _refuse_what_loses_bits(image: Any) -> None:
    """Of some images of more than 8 bits Pillow gives the upper 8 alone, or takes bytes for samples."""
    kind = getattr(image, "format", None)
    tags: Any = getattr(image, "tag_v2", {})
    if tags.get(_TIFF_PLANES) == 2 and len(tags.get(_TIFF_BITS, ())) > 1 and max(tags[_TIFF_BITS]) > 8:
        raise OutOfRange("16-bit colours in separate planes: store them pixel by pixel")
    file = getattr(image, "fp", None)
    if kind not in ("JPEG2000", "SGI") or file is None or file.closed:
        return
    file.seek(0)
    content = file.read()
    if kind == "SGI":
        bits = 8 * content[3]
    else:
        about = content.partition(_CODESTREAM)[2][36:]  # how many channels, and three bytes on each
        channels = int.from_bytes(about[:2], "big")
        bits = max((1 + (size & 0x7F) for size in about[2 : 2 + 3 * channels : 3]), default=0)
    if bits > 8:
        raise OutOfRange(f"{bits}-bit {kind}, of which 8 bits would be read: store it as PNG or TIFF")


def _raw_mode(tile: Any) -> str:
    args = tile[3]
    found = args if isinstance(args, str) else args[0] if args else ""
    return found if isinstance(found, str) else ""


def _with_raw_mode(image: Any, mode: str) -> Any:
    image.tile = [
        tile._replace(args=mode if isinstance(tile.args, str) else (mode, *tile.args[1:])) for tile in image.tile
    ]
    return image
