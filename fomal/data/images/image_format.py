"""From the content of an image file to the pixels a network sees: the same for training and for a user's own images."""

from __future__ import annotations

import io
import os
import struct
import threading
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageFile, ImageOps, UnidentifiedImageError
from torch import Tensor

from fomal.data.images.image_kinds import HEAD, KINDS, kind_of, kinds_to_try
from fomal.data.images.levels import Deep, OutOfRange, ValueRange, checked, deep_array, deep_image
from fomal.data.images.source_base import Content
from fomal.utils.checks import numbers, one_of, positive

Color = Literal["rgb", "gray", "binary"]
Fit = Literal["crop", "stretch", "pad"]
Resample = Literal["nearest", "bilinear", "bicubic", "lanczos"]

_RESAMPLE = {name: Image.Resampling[name.upper()] for name in ("nearest", "bilinear", "bicubic", "lanczos")}
_MODES = {"rgb": "RGB", "gray": "L", "binary": "L"}
_TURNS = {  # by EXIF's orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_LARGE = 2**24  # pixels of an image that is decoded alone, so that not every thread has one in memory
_ALONE = threading.Lock()
_DRAFT = 2  # a JPEG may be decoded at a lower scale, as long as it is this many times the size wanted


MAX_PIXELS = 128_000_000
"""The default of `max_pixels`: above any ordinary camera's, and half a gigabyte in memory."""


@dataclass
class Remarks:
    """Observations about images that could be read, which are worth a line when all have been.

    Attributes:
        misnamed: what the images hold whose names promise something else, by name.
        peaks: the largest value of each image of more than 8 bits.
    """

    misnamed: dict[str, str] = field(default_factory=dict)
    peaks: list[float] = field(default_factory=list)

    def lines(self, value_range: ValueRange) -> list[str]:
        """The observations, in a line each.

        Args:
            value_range: of the format that the images were read with.
        """
        lines = []
        if self.misnamed:
            first = [f"{name} ({kind})" for name, kind in sorted(self.misnamed.items())[:3]]
            more = f" and {len(self.misnamed) - 3} more" if len(self.misnamed) > 3 else ""
            lines.append(f"images of another kind than their names say are read all the same: {', '.join(first)}{more}")
        peak = max(self.peaks, default=0.0)
        count = f"the {len(self.peaks)} images of more than 8 bits"
        if value_range is None and self.peaks and peak < 2**14:
            bits = max(1, int(peak).bit_length())
            lines.append(
                f"{count} have no value above {peak:.0f} of 65535, so that they become nearly black: set "
                f"data.value_range: {bits} (bits), [darkest, brightest] or image"
            )
        if isinstance(value_range, int) and peak >= 2**value_range:
            lines.append(f"{count} have values up to {peak:.0f}, of which value_range={value_range} bits cut the top")
        if isinstance(value_range, tuple) and self.peaks and peak <= value_range[0]:
            lines.append(f"{count} have no value above {peak:g}, so that value_range={list(value_range)} blackens all")
        return lines


@dataclass(frozen=True)
class ImageFormat:
    """Size, colours and values of the network's images, and how files become such.

    Grey, palette, CMYK and YCbCr images are converted; alpha is laid over `background`; an animation is its first
    frame; a photograph is turned as its EXIF data say; `value_range` says how 16 bits and more become 8.

    Args:
        height: of the images, in pixels.
        width: likewise.
        color: "rgb" has three channels, "gray" one, "binary" one of black and white alone, cut at 128.
        fit: what to do with another aspect ratio: "crop" keeps the centre, "stretch" distorts, "pad" adds
            `background`.
        resample: how sizes are changed; "binary" can be "nearest" alone.
        background: grey level 0 to 255 below transparent and beside padded images.
        max_pixels: files with more are refused before they are decoded.
        mean: subtracted from values in [0, 1], one for each channel or one for all.
        std: what they are divided by then, likewise.
        value_range: of images of more than 8 bits, what becomes black and what white: a number of bits, e.g. 12;
            the darkest and the brightest value; "image", the smallest and the largest value of each image. None:
            all that the file's kind allows, 16 bits for most, of which the upper 8 are kept; images of floating-point,
            negative or larger values are refused then.

    Raises:
        ValueError: for a setting that is none of these.
    """

    height: int
    width: int
    color: Color = "rgb"
    fit: Fit = "crop"
    resample: Resample = "bilinear"
    background: int = 255
    max_pixels: int = MAX_PIXELS
    mean: Sequence[float] = (0.0,)
    std: Sequence[float] = (1.0,)
    value_range: ValueRange = None

    def __post_init__(self) -> None:
        for name, values in (("mean", self.mean), ("std", self.std)):
            numbers(**{name: values})
        object.__setattr__(self, "mean", tuple(self.mean))  # so that lists, as JSON has them, compare equal
        object.__setattr__(self, "std", tuple(self.std))
        object.__setattr__(self, "value_range", checked(self.value_range))
        positive(height=self.height, width=self.width)
        positive(2**63, max_pixels=self.max_pixels)
        if self.height * self.width > MAX_PIXELS:
            raise ValueError(
                f"height={self.height} and width={self.width} are more than {MAX_PIXELS} pixels: use smaller images."
            )
        one_of(_MODES, color=self.color)
        one_of(("crop", "stretch", "pad"), fit=self.fit)
        one_of(_RESAMPLE, resample=self.resample)
        if self.color == "binary" and self.resample != "nearest":
            raise ValueError(f"resample={self.resample!r} makes greys of color='binary': use resample: nearest.")
        if not isinstance(self.background, int) or not 0 <= self.background <= 255:
            raise ValueError(f"background={self.background} is no grey level: use 0 (black) to 255 (white).")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, self.channels):
                raise ValueError(
                    f"{name}={list(values)} has {len(values)} values for {self.channels} channels: "
                    f"give one for each channel, or one for all."
                )
        if not all(value > 0 for value in self.std):
            raise ValueError(f"std={list(self.std)} must be positive.")

    @property
    def channels(self) -> int:
        """Channels of the images."""
        return 3 if self.color == "rgb" else 1

    def decode(
        self, content: Content | Image.Image, name: str = "", remarks: Remarks | None = None
    ) -> NDArray[np.uint8]:
        """An image as (C, H, W) uint8, 0 to 255.

        Args:
            content: a file's bytes, an array (H, W), (H, W, 1), (H, W, 3) or, with alpha, (H, W, 4), or an image of
                Pillow's. An array is uint8, or as images of more than 8 bits are: other integers or floating point.
            name: the file's name; its suffix tells kinds of image that their content does not.
            remarks: where to note what is worth saying of it.

        Raises:
            ValueError: it is no whole image of a known kind, is too large, or has values that no range is known for;
                says the reason alone, without the name.
        """
        remarks = Remarks() if remarks is None else remarks
        if isinstance(content, np.ndarray):
            content = _checked_array(content)
            if content.dtype != np.uint8:
                return self._pixels(self._reduced(deep_array(content), remarks))
            content = Image.fromarray(content)
        if isinstance(content, Image.Image):
            return self._pixels(self._eight_bits(content, None, remarks))
        suffix = os.path.splitext(name)[1].lower()  # pathlib takes a quarter of a drawing's time
        try:
            with _open(content, kinds_to_try(suffix)) as image:
                self.refuse(image)
                wanted = _DRAFT * max(self.height, self.width)
                image.draft(None, (wanted, wanted))  # None keeps the mode; of JPEG alone
                with _ALONE if image.width * image.height > _LARGE else nullcontext():
                    again = partial(_open, content, (str(image.format),))
                    pixels = self._pixels(self._eight_bits(image, again, remarks))
                if suffix in KINDS and image.format not in KINDS[suffix]:
                    remarks.misnamed[name] = str(image.format)
                return pixels
        except (Refused, OutOfRange) as error:
            raise ValueError(str(error)) from None
        except UnidentifiedImageError:
            kind = kind_of(content[:HEAD])
            raise ValueError(
                f"damaged, or {kind} of a form that is not read" if kind else "no image of a known kind"
            ) from None
        except Image.DecompressionBombError as error:
            raise ValueError(f"too many pixels: {error}") from None
        except Exception as error:  # damaged files raise almost anything: OSError, SyntaxError, struct.error
            raise ValueError(f"damaged: {str(error) or type(error).__name__}") from error

    def refuse(self, image: Image.Image) -> None:
        """Raise `Refused` for an image, of which only the head has been read, that must not be decoded."""
        width, height = image.size
        if width * height > self.max_pixels:
            raise Refused(f"{width} x {height} pixels, more than max_pixels={self.max_pixels}")

    def _eight_bits(self, image: Image.Image, again: Any, remarks: Remarks) -> Image.Image:
        """The image, turned as it was seen, with its values in 8 bits; of any mode."""
        deep = deep_image(image, again)
        image.load()
        return _turned(image if deep is None else self._reduced(deep, remarks), _orientation(image))

    def _reduced(self, deep: Deep, remarks: Remarks) -> Image.Image:
        reduced = deep.reduced(self.value_range)
        remarks.peaks.append(deep.peak())
        return reduced

    def _pixels(self, image: Image.Image) -> NDArray[np.uint8]:
        if self.resample == "nearest" and self.fit == "stretch":
            image = self._resized(image)  # first, since it leaves fewer pixels to convert, each as it was
        image = self._resized(_converted(image, _MODES[self.color], self.background))
        pixels = np.asarray(image)
        if self.color == "binary":
            pixels = np.uint8(255) * (pixels >= 128)
        return np.ascontiguousarray(pixels.transpose(2, 0, 1) if pixels.ndim == 3 else pixels[None])

    def _resized(self, image: Image.Image) -> Image.Image:
        size, how = (self.width, self.height), _RESAMPLE[self.resample]
        if image.size == size:
            return image
        if self.fit == "crop":
            return ImageOps.fit(image, size, how)
        if self.fit == "pad":
            color = (self.background,) * 3 if self.channels == 3 else self.background
            return ImageOps.pad(image, size, how, color=color)
        return image.resize(size, how)

    def normalize(self, x: Tensor) -> Tensor:
        """Pixels (..., C, H, W) uint8 to float32: values / 255, minus `mean`, divided by `std`."""
        y = x.to(torch.float32, copy=True).div_(255)
        if any(self.mean) or set(self.std) != {1.0}:
            y.sub_(_by_channel(self.mean, y)).div_(_by_channel(self.std, y))
        return y


def _by_channel(values: Sequence[float], like: Tensor) -> Tensor:
    """(C, 1, 1), or (1, 1, 1) for all; filled in on the device, since a copy from the host would wait for it."""
    return torch.stack([like.new_full((1, 1), value) for value in values])


class Refused(ValueError):
    """An image that could be decoded, but must not be."""


def _open(content: bytes, kinds: Sequence[str]) -> ImageFile.ImageFile:
    """An image of one of these kinds, not loaded yet; without the limit that `Image.open` has besides `max_pixels`."""
    for kind in kinds:
        factory, accept = Image.OPEN[kind]
        try:
            found = accept is None or accept(content[:16])
            if found and not isinstance(found, str):  # a text says why it cannot be decoded here
                return factory(io.BytesIO(content), "")
        except (SyntaxError, IndexError, TypeError, struct.error):  # how plugins say that it is of another kind
            continue
    raise UnidentifiedImageError


def _checked_array(array: NDArray[Any]) -> NDArray[Any]:
    if array.dtype == bool:
        array = 255 * array.astype(np.uint8)
    good = array.dtype.kind in "uif" and array.size and array.ndim > 1 and array.shape[2:] in ((), (1,), (3,), (4,))
    if not good:
        raise Refused(f"shape {array.shape}, {array.dtype}: give (H, W), (H, W, 1), (H, W, 3) or (H, W, 4) of numbers")
    return array[..., 0] if array.shape[2:] == (1,) else array


def _orientation(image: Image.Image) -> Any:
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # unreadable EXIF data say nothing
        return None


def _turned(image: Image.Image, orientation: Any) -> Image.Image:
    """An image as it was seen; ImageOps.exif_transpose would fail on what else may be wrong with the EXIF data."""
    return image.transpose(_TURNS[orientation]) if orientation in _TURNS else image


def _converted(image: Image.Image, mode: str, background: int) -> Image.Image:
    """An image of any mode of 8 bits as RGB or L."""
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        below = Image.new("RGBA", image.size, (background, background, background, 255))
        image = Image.alpha_composite(below, image).convert("RGB")
    if image.mode not in ("1", "L", "RGB"):
        image = image.convert("RGB")
    return image if image.mode == mode else image.convert(mode)
