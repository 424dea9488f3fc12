"""Telling which files are images: by their suffix, or by how their content begins."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import PurePosixPath

from PIL import Image

Image.init()  # all plugins now, rather than in the first of many threads

# EPS would run Ghostscript, FITS may inflate without a bound; the others Pillow knows, but cannot decode by itself.
_NEVER = frozenset({"EPS", "FITS", "WMF", "BUFR", "GRIB", "HDF5", "MPEG", "IPTC"})
_READ = [kind for kind in Image.OPEN if kind not in _NEVER]
_FAMILIES = {
    "JPEG": ("JPEG", "MPO"),  # some cameras' JPEGs have a second picture, for depth
    "BMP": ("BMP", "DIB"),
    "DIB": ("DIB", "BMP"),
}

HEAD = 32
"""Bytes from which `kind_of` tells what a file holds."""

_BEGINNINGS = re.compile(
    rb"(?P<PNG>\x89PNG\r\n\x1a\n)|(?P<WEBP>RIFF.{4}WEBP)|(?P<GIF>GIF8[79]a)"
    rb"|(?P<BMP>BM.{12}[\x0c\x28\x34\x38\x40\x6c\x7c]\0\0\0)|(?P<JPEG>\xff\xd8\xff)"
    rb"|(?P<TIFF>II[*+]\0|MM\0[*+])|(?P<PPM>P[1-6fF]\s)"
    rb"|(?P<JPEG2000>\0\0\0\x0cjP  |\xff\x4f\xff\x51)|(?P<AVIF>.{4}ftypavi[fs])|(?P<PSD>8BPS\0\1)|(?P<QOI>qoif)",
    re.DOTALL,
)
_SURE = (*_BEGINNINGS.groupindex, "MPO")

KINDS: dict[str, tuple[str, ...]] = {
    suffix: _FAMILIES.get(kind, (kind,)) for suffix, kind in Image.registered_extensions().items() if kind in _READ
}
"""The kinds of image that a suffix promises, by Pillow's names."""


def kind_of(head: bytes) -> str | None:
    """The kind of image whose content begins with `head`, of `HEAD` bytes; None where it cannot be told."""
    found = _BEGINNINGS.match(head)
    return found.lastgroup if found else None


def kinds_to_try(suffix: str) -> list[str]:
    """The kinds that a file with this suffix, in small letters, may be: what is sure by its content, then by name."""
    return [kind for kind in (*_SURE, *KINDS.get(suffix, ())) if kind in Image.OPEN]


def not_an_image(name: str, head: Callable[[], bytes]) -> str | None:
    """Tell images from other files.

    A file with the suffix of an image that Pillow can read is one, whatever its content. One with another suffix or
    none is one if its content begins like an image's; but not like a TIFF's under another suffix, since raw data of
    cameras and slides of microscopes do as well.

    Args:
        name: of the file.
        head: gives the first `HEAD` bytes of it; asked where the suffix does not say.

    Returns:
        None for an image, else a word for what it is, such as its suffix; many files have the same.
    """
    suffix = PurePosixPath(name).suffix.lower()
    if suffix in KINDS:
        return None
    try:
        kind = kind_of(head())
    except OSError as error:
        return f"unreadable ({error.strerror or error})"
    if kind is not None and (kind != "TIFF" or not suffix):
        return None
    return suffix or "no suffix"
