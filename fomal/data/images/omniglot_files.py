"""Omniglot on disk: find or download its two parts, read the drawings, keep them in a cache file."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision.datasets import Omniglot
from torchvision.datasets.utils import download_url

from fomal.data.images.cache import Arrays, UnsafeCache, cache_folder, read_arrays, unusable, write_arrays
from fomal.utils.files import read_regular
from fomal.utils.output import rank_zero_info, rank_zero_warn

PARTS = ("images_background", "images_evaluation")
SIDE = 105  # pixels of a drawing
_PLACES = ("", Omniglot.folder)  # below root; torchvision puts its copy into the second
_LARGEST_FILE = 2**20  # bytes; the drawings have some hundred
_REMEDY = "replace it by the original, or set data.root to another copy."
_FORMAT = 1  # raise it when the arrays in the cache or the way to make them change

Key = tuple[str, str, str]
"""Alphabet, character, file name: the path of a drawing in its part, and what drawings are ordered by."""


class Characters(NamedTuple):
    """All characters of both parts, background first, each part in alphabetical order.

    Attributes:
        images: (N, 1, H, W) uint8, background 1 and ink 0; the drawings of a character follow each other.
        counts: (K,) int64, how many drawings each character has.
        names: K names "part/alphabet/character".
    """

    images: Tensor
    counts: Tensor
    names: list[str]


def load_characters(root: str, download: bool, cache_dir: str | None, image_size: int) -> Characters:
    """Load Omniglot from its cache file, which is built first where it is missing or damaged.

    Args:
        root: folder with the zips or the extracted folders of both parts.
        download: fetch the parts that `root` lacks.
        cache_dir: folder of the cache file; see `fomal.data.images.cache.cache_folder`.
        image_size: height and width of the images, in pixels.

    Raises:
        FileNotFoundError: `root` lacks a part.
        OSError: `cache_dir` cannot be written.
        RuntimeError: the download failed.
        ValueError: a file is damaged, or holds something else than Omniglot.
    """
    sources = find_sources(root, download)
    path = cache_folder(cache_dir) / f"omniglot-{image_size}px-{fingerprint(sources)}.cache"
    arrays = read_arrays(path)
    if arrays is None:
        rank_zero_info(f"Reading the drawings of Omniglot from {root} into {path}, once.")
        arrays = read_sources(sources, image_size)
        try:
            write_arrays(path, arrays)
        except UnsafeCache as error:
            rank_zero_warn(unusable(path.parent, error, "the drawings are read again by each process"))
    pixels = np.unpackbits(arrays["packed"], axis=1, count=image_size**2)
    images = torch.from_numpy(pixels).view(-1, 1, image_size, image_size)
    return Characters(images, torch.from_numpy(arrays["counts"]), arrays["names"].tolist())


def find_sources(root: str, download: bool = False) -> list[Path]:
    """The zip or folder of each of `PARTS`, in this order.

    Raises:
        FileNotFoundError: a part is missing, and `download` is off.
        RuntimeError: a part is missing, and its download failed.
    """
    folder = Path(root).expanduser()
    sources = [_find(folder, part) for part in PARTS]
    lacking = [part for part, source in zip(PARTS, sources, strict=True) if source is None]
    if lacking and not download:
        state = "has" if folder.is_dir() else "is not a folder, so it has"
        looked_for = " and ".join(f"neither {part}.zip nor a folder {part}/" for part in lacking)
        raise FileNotFoundError(
            f"root={root!r} {state} {looked_for}, also not below {Omniglot.folder}/: "
            f"set data.root to the folder with both parts of Omniglot, or set data.download: true."
        )
    return [source or _download(folder, part) for part, source in zip(PARTS, sources, strict=True)]


def _find(folder: Path, part: str) -> Path | None:
    for place in _PLACES:
        archive, extracted = folder / place / f"{part}.zip", folder / place / part
        if archive.is_file():
            return archive
        if extracted.is_dir():
            return extracted
    return None


def _download(folder: Path, part: str) -> Path:
    """Fetch the zip of a part into `folder`; a download that fails or is cut off leaves nothing there."""
    name = f"{part}.zip"
    url = f"{Omniglot.download_url_prefix}/{name}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".download-", dir=folder) as unfinished:
            download_url(url, unfinished, filename=name, md5=Omniglot.zips_md5[part])
            os.replace(Path(unfinished) / name, folder / name)
    except (OSError, RuntimeError) as error:  # no network, no space; a wrong MD5 is a RuntimeError
        raise RuntimeError(
            f"download=True could not fetch {url} ({error}): try again, or put {name} into root={str(folder)!r}."
        ) from error
    return folder / name


def fingerprint(sources: list[Path]) -> str:
    """A short hash of names, sizes and times of the files in `sources`, which are not opened.

    Their folder does not enter, so that a copy that keeps the times (`cp -p`) shares the cache file.
    """
    state: list[object] = [_FORMAT]
    for part, source in zip(PARTS, sources, strict=True):
        files = {("", "", source.name): source} if source.is_file() else _list_folder(source)
        state.append(part)
        for key, path in sorted(files.items()):
            with _blame(str(path), "file"):  # it may be a link to nowhere
                stat = path.stat()
            state.append((*key, stat.st_size, stat.st_mtime_ns))
    return hashlib.sha256(json.dumps(state).encode()).hexdigest()[:16]


def read_sources(sources: list[Path], image_size: int) -> Arrays:
    """Read, check and shrink every drawing.

    Returns:
        packed: (N, ceil(image_size**2 / 8)) uint8, eight pixels in a byte.
        counts: (K,) int64, drawings per character.
        names: (K,) strings "part/alphabet/character".

    Raises:
        ValueError: a zip or a drawing is damaged, too large or not of Omniglot's size; a part holds no drawing.
    """
    packed: list[NDArray[np.uint8]] = []
    counts: dict[str, int] = {}
    for part, source in zip(PARTS, sources, strict=True):
        drawings = _zip_drawings(source, part) if source.is_file() else _folder_drawings(source)
        before = len(packed)
        for (alphabet, character, file), png in drawings:
            name = f"{part}/{alphabet}/{character}"
            pixels = decode(png, image_size, f"{source}: {name}/{file}")
            packed.append(np.packbits(pixels))
            counts[name] = counts.get(name, 0) + 1
        if len(packed) == before:
            raise ValueError(
                f"{source} holds no characters, no <alphabet>/<character>/*.png: put a whole copy of Omniglot's "
                f"{part} there, or set data.root to another folder."
            )
    return {
        "packed": np.stack(packed),
        "counts": np.array(list(counts.values()), dtype=np.int64),
        "names": np.array(list(counts)),
    }


def decode(png: bytes, image_size: int, label: str) -> NDArray[np.bool_]:
    """Decode one drawing and shrink it as the paper's code does.

    Args:
        png: content of a PNG file.
        image_size: height and width wanted.
        label: what to call the file in an error.

    Returns:
        (image_size, image_size) bool, False where there is ink.
    """
    with _blame(label, "PNG"), Image.open(io.BytesIO(png), formats=("PNG",)) as image:
        size = image.size
        if size == (SIDE, SIDE):  # before decoding, so that a huge image costs nothing
            # Without dithering, should someone have stored the drawings in shades of grey.
            ink = image if image.mode == "1" else image.convert("L").convert("1", dither=Image.Dither.NONE)
            return np.asarray(ink.resize((image_size, image_size), Image.Resampling.NEAREST))
    raise ValueError(f"{label} has {size[0]} x {size[1]} pixels, a drawing of Omniglot {SIDE} x {SIDE}: {_REMEDY}")


@contextmanager
def _blame(label: str, kind: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # damaged files raise almost anything: OSError, RuntimeError, SyntaxError, zlib.error
        raise ValueError(f"{label} is not a readable {kind} ({error}): {_REMEDY}") from error


def _check_size(label: str, size: int) -> None:
    if size > _LARGEST_FILE:
        raise ValueError(f"{label} has {size} bytes, more than the {_LARGEST_FILE} allowed for a drawing: {_REMEDY}")


def _is_drawing(file: str) -> bool:
    return file.lower().endswith(".png") and not file.startswith(".")  # macOS leaves ._*.png beside the drawings


def _list_folder(folder: Path) -> dict[Key, Path]:
    paths = (path for path in folder.glob("*/*/*") if _is_drawing(path.name))
    return {(path.parts[-3], path.parts[-2], path.name): path for path in paths}


def _folder_drawings(folder: Path) -> Iterator[tuple[Key, bytes]]:
    for key, path in sorted(_list_folder(folder).items()):
        _check_size(str(path), path.stat().st_size)
        with _blame(str(path), "file"):
            content = read_regular(path, _LARGEST_FILE)
        yield key, content


def _zip_drawings(path: Path, part: str) -> Iterator[tuple[Key, bytes]]:
    """The drawings of a zip, in order; nothing is extracted, names are only compared and sorted."""
    with _blame(str(path), "zip"):
        archive = zipfile.ZipFile(path)
    with archive:
        names = (name.split("/") for name in archive.namelist())
        keys = {(n[1], n[2], n[3]) for n in names if len(n) == 4 and n[0] == part and _is_drawing(n[3])}
        for key in sorted(keys):
            member = "/".join((part, *key))
            label = f"{path}: {member}"
            _check_size(label, archive.getinfo(member).file_size)
            with _blame(label, "member"), archive.open(member) as file:
                content = file.read(_LARGEST_FILE)  # bounds what a member inflates to, whatever size it claims
            yield key, content
