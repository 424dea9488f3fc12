"""Images as a user has them: files, folders, pictures, arrays and tensors, one or many."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from fomal.data.images.image_format import ImageFormat, Remarks
from fomal.data.images.source import is_archive, open_source
from fomal.utils.checks import fits_memory
from fomal.utils.files import read_regular
from fomal.utils.output import rank_zero_warn

ImageLike = str | Path | Image.Image | NDArray[Any] | Tensor
"""A file, an image of Pillow's, an array (H, W) or (H, W, C), or a tensor (C, H, W); uint8, or of more than 8 bits as
`ImageFormat.value_range` says."""

_CHANNELS = (1, 3, 4)
_BYTES = 2  # of each number of all images, which are there apart and together
_GIVE = "give files, images of Pillow's, arrays (H, W) or (H, W, C), or tensors (C, H, W)"


def decode_all(images: ImageLike | Iterable[ImageLike], image_format: ImageFormat) -> NDArray[np.uint8]:
    """Images of any size as (N, C, H, W) uint8; warns of what is worth a line about them all.

    Args:
        images: many, or one; (N, C, H, W) or (N, H, W, C); or the path of a folder or an archive, of which all
            images are taken, sorted by name.
        image_format: what they become.

    Raises:
        FileNotFoundError: there is no such file or folder.
        TypeError: it is nothing of the kind.
        ValueError: some cannot be read; names them all; or a folder has none; or they would not fit the memory.
    """
    decoded: list[NDArray[np.uint8]] = []
    wrong, remarks = [], Remarks()
    size = image_format.channels * image_format.height * image_format.width
    for name, image in _named(images):
        numbers = (len(decoded) + 1) * size
        fits_memory("the images", numbers, _BYTES, height=image_format.height, width=image_format.width)
        try:
            decoded.append(image_format.decode(_content(image), name, remarks))
        except (ValueError, OSError) as error:
            wrong.append(f"{name} ({error})")
    if wrong:
        raise ValueError(f"{len(wrong)} images cannot be used: {'; '.join(wrong)}.")
    for line in remarks.lines(image_format.value_range):
        rank_zero_warn(f"{line}.")
    shape = (0, image_format.channels, image_format.height, image_format.width)
    return np.stack(decoded) if decoded else np.zeros(shape, np.uint8)


def _named(images: ImageLike | Iterable[ImageLike]) -> Iterator[tuple[str, Any]]:
    """The images with what to call them in messages."""
    if isinstance(images, str | Path):
        yield from _of_path(images)
    elif isinstance(images, Image.Image) or _is_one(images):
        yield "image 0", images
    elif isinstance(images, bytes | bytearray | Mapping) or not hasattr(images, "__iter__"):
        raise TypeError(f"images is {type(images).__name__}: {_GIVE}, one or several, or the path of a folder.")
    else:
        for place, image in enumerate(images):
            yield str(image) if isinstance(image, str | Path) else f"image {place}", image


def _is_one(images: object) -> bool:
    """Tell whether an array or a tensor is a single image rather than many."""
    if not isinstance(images, np.ndarray | Tensor):
        return False
    if images.ndim not in (2, 3, 4):
        raise ValueError(f"images has shape {tuple(images.shape)}: {_GIVE}, or many in one more dimension.")
    channels = images.shape[0 if isinstance(images, Tensor) else -1]
    return images.ndim == 2 or (images.ndim == 3 and channels in _CHANNELS)


def _of_path(given: str | Path) -> Iterator[tuple[str, Any]]:
    path = Path(given).expanduser()
    if not (path.is_dir() or is_archive(path)):
        if not path.exists():
            raise FileNotFoundError(f"images={str(given)!r} does not exist: give a file, or a folder or zip of images.")
        yield str(given), path
        return
    source = open_source(str(path), "images")
    if not source.images:
        raise ValueError(f"{source.label} has no image.")
    for name in source.images:
        try:
            yield f"{given}/{name}", source.read(name)
        except OSError as error:
            raise ValueError(f"{given}/{name} cannot be read ({error}): mend or remove it.") from error


def _content(image: Any) -> bytes | Image.Image | NDArray[Any]:
    """A file's bytes, or the pixels (H, W) or (H, W, C)."""
    if isinstance(image, str | Path):
        return read_regular(Path(image).expanduser())
    if isinstance(image, bytes | Image.Image):
        return image
    if isinstance(image, Tensor):
        image = image.cpu().movedim(0, -1).numpy() if image.ndim == 3 else image.cpu().numpy()
    if not isinstance(image, np.ndarray):
        raise ValueError(f"{type(image).__name__}: {_GIVE}")
    return image
