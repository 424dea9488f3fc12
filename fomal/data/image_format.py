"""From the content of an image file to the pixels a network sees: the same for training and for a user's own images."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from fomal.checks import one_of, positive
from fomal.data.source import Content

Color = Literal["rgb", "gray", "binary"]
Fit = Literal["crop", "stretch", "pad"]
Resample = Literal["nearest", "bilinear", "bicubic", "lanczos"]

_RESAMPLE = {name: Image.Resampling[name.upper()] for name in ("nearest", "bilinear", "bicubic", "lanczos")}
_MODES = {"rgb": "RGB", "gray": "L", "binary": "L"}
_KINDS = {  # what content a name promises
    **{f".{kind.lower()}": (kind,) for kind in ("PNG", "WEBP", "GIF", "BMP")},  # tried in this order
    **dict.fromkeys((".jpg", ".jpeg"), ("JPEG", "MPO")),  # some cameras' JPEGs have a second picture, for depth
    **dict.fromkeys((".tif", ".tiff"), ("TIFF",)),
    **dict.fromkeys((".pbm", ".pgm", ".ppm"), ("PPM",)),
}
_TURNS = {  # by EXIF's orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_FORMATS = tuple(dict.fromkeys(kinds[0] for kinds in _KINDS.values()))
Image.init()  # all plugins now, rather than in the first of many threads
_DRAFT = 2  # a JPEG may be decoded at a lower scale, as long as it is this many times the size wanted


@dataclass(frozen=True)
class ImageFormat:
    """Size, colours and values of the network's images, and how files become such.

    Grey, palette, 16-bit, CMYK and YCbCr images are converted; alpha is laid over `background`; an animation is its
    first frame; a photograph is turned as its EXIF data say. 16 bits keep the upper 8.

    Args:
        height: of the images, in pixels.
        width: likewise.
        color: "rgb" has three channels, "gray" one, "binary" one of black and white alone, cut at 128.
        fit: what to do with another aspect ratio: "crop" keeps the centre, "stretch" distorts, "pad" adds
            `background`.
        resample: how sizes are changed; "binary" can be "nearest" alone.
        background: grey level 0 to 255 below transparent and beside padded images.
        max_pixels: files with more are refused before they are decoded; Pillow itself refuses more than 178,956,970.
        mean: subtracted from values in [0, 1], one for each channel or one for all.
        std: what they are divided by then, likewise.

    Raises:
        ValueError: for a setting that is none of these.
    """

    height: int
    width: int
    color: Color = "rgb"
    fit: Fit = "crop"
    resample: Resample = "bilinear"
    background: int = 255
    max_pixels: int = 50_000_000
    mean: Sequence[float] = (0.0,)
    std: Sequence[float] = (1.0,)

    def __post_init__(self) -> None:
        object.__setattr__(self, "mean", tuple(self.mean))  # so that lists, as JSON has them, compare equal
        object.__setattr__(self, "std", tuple(self.std))
        positive(height=self.height, width=self.width, max_pixels=self.max_pixels)
        one_of(_MODES, color=self.color)
        one_of(("crop", "stretch", "pad"), fit=self.fit)
        one_of(_RESAMPLE, resample=self.resample)
        if self.color == "binary" and self.resample != "nearest":
            raise ValueError(f"resample={self.resample!r} makes greys of color='binary': use resample: nearest.")
        if not 0 <= self.background <= 255:
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

    def decode(self, content: Content | Image.Image, name: str = "") -> NDArray[np.uint8]:
        """An image as (C, H, W) uint8, 0 to 255.

        Args:
            content: a file's bytes, an array (H, W), (H, W, 1), (H, W, 3) or, with alpha, (H, W, 4) uint8, or an
                image of Pillow's.
            name: the file's name; its suffix must promise what the content is. Empty promises nothing.

        Raises:
            ValueError: it is no whole image of a known kind, is not of the kind its name promises, or is too large;
                says the reason alone, without the name.
        """
        if isinstance(content, np.ndarray):
            content = _as_image(content)
        if isinstance(content, Image.Image):
            return self._pixels(content)
        try:
            with Image.open(io.BytesIO(content), formats=_FORMATS) as image:
                self._check(image, name)
                wanted = _DRAFT * max(self.height, self.width)
                image.draft(None, (wanted, wanted))  # None keeps the mode; of JPEG alone
                return self._pixels(image)
        except _Refused as error:
            raise ValueError(str(error)) from None
        except UnidentifiedImageError:
            raise ValueError(f"no image of a known kind ({', '.join(_FORMATS)})") from None
        except Image.DecompressionBombError as error:
            raise ValueError(f"too many pixels: {error}") from None
        except Exception as error:  # damaged files raise almost anything: OSError, SyntaxError, struct.error
            raise ValueError(f"damaged: {str(error) or type(error).__name__}") from error

    def _check(self, image: Image.Image, name: str) -> None:
        width, height = image.size
        if width * height > self.max_pixels:
            raise _Refused(f"{width} x {height} pixels, more than max_pixels={self.max_pixels}")
        promised = _KINDS.get(os.path.splitext(name)[1].lower())  # pathlib takes a quarter of a drawing's time
        if promised and image.format not in promised:
            raise _Refused(f"holds {image.format}, not {promised[0]} as its name says: rename it")

    def _pixels(self, image: Image.Image) -> NDArray[np.uint8]:
        image.load()
        image = self._resized(_converted(_turned(image), _MODES[self.color], self.background))
        if self.color == "binary":
            image = image.point(lambda v: 255 * (v >= 128))
        pixels = np.asarray(image)
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


class _Refused(ValueError):
    """An image that could be decoded, but must not be."""


def _as_image(array: NDArray[np.uint8]) -> Image.Image:
    if array.dtype != np.uint8 or not array.size or array.shape[2:] not in ((), (1,), (3,), (4,)) or array.ndim < 2:
        raise _Refused(f"shape {array.shape}, {array.dtype}: give (H, W), (H, W, 1), (H, W, 3) or (H, W, 4) uint8")
    return Image.fromarray(array[..., 0] if array.shape[2:] == (1,) else array)


def _turned(image: Image.Image) -> Image.Image:
    """An image as it was seen; ImageOps.exif_transpose would fail on what else may be wrong with the EXIF data."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # unreadable EXIF data say nothing
        return image
    return image.transpose(_TURNS[orientation]) if orientation in _TURNS else image


def _converted(image: Image.Image, mode: str, background: int) -> Image.Image:
    """An image of any mode as RGB or L."""
    if image.mode == "F":
        raise _Refused("floating-point pixels, whose range is not defined: store 8 or 16 bits")
    if image.mode.startswith("I"):  # 16 bits; Pillow's own conversion would clip them
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise _Refused("pixels of more than 16 bits: store 8 or 16")
        clear = image.info.get("transparency")
        image = Image.fromarray((values >> 8).astype(np.uint8))
        if clear is not None:
            image.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        below = Image.new("RGBA", image.size, (background, background, background, 255))
        image = Image.alpha_composite(below, image).convert("RGB")
    if image.mode not in ("1", "L", "RGB"):
        image = image.convert("RGB")
    return image if image.mode == mode else image.convert(mode)
