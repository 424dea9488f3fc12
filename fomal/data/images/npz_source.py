"""Images and labels in numpy's npz, as MedMNIST and others publish them; nothing that is in them is run."""

from __future__ import annotations

import math
import tempfile
import threading
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fomal.data.images.source_base import ImagesAlone
from fomal.data.images.zip_source import refuse_member
from fomal.utils.output import rank_zero_info

_PARTS = {  # names of arrays of images and of their labels, and the split that they are of
    **{f"{split}_images": (f"{split}_labels", split) for split in ("train", "val", "test")},
    **{f"{name}_images": (f"{name}_labels", "val") for name in ("valid", "validation")},
    **{f"x_{split}": (f"y_{split}", split) for split in ("train", "val", "test")},
    "images": ("labels", ""),
    "x": ("y", ""),
}
_LARGEST_LABELS = 2**28  # bytes
_BLOCK = 2**20
_INFLATING = threading.Lock()


class _Array(NamedTuple):
    """An array in the file, of which only the header has been read."""

    member: zipfile.ZipInfo
    begin: int  # of its numbers
    shape: tuple[int, ...]
    order: Any
    dtype: np.dtype[Any]


class NpzSource(ImagesAlone):
    """Images (N, H, W), (N, H, W, C) or (N, C, H, W) and their labels (N,) or (N, 1).

    The arrays are called train_images and train_labels, likewise with val and test, or x_train and y_train, images and
    labels, or x and y. An image is named "split/label/number" where no class is in two splits. Otherwise it is named
    "label/split-number", since a few-shot learner is tested on classes that it was not trained on.

    Args:
        path: of the file.
        setting: the argument that it was given as.
        cache_gb: how many 10**9 bytes the images may have; they are inflated into temporary files without a name.

    Raises:
        ValueError: it is damaged or hostile, has no such arrays, or is too large.
    """

    def __init__(self, path: Path, setting: str = "root", cache_gb: float = 4.0) -> None:
        self.where, self.setting, self.path = str(path), setting, path
        self._state = _state(path)
        self._opened: dict[str, NDArray[Any]] = {}
        try:
            with zipfile.ZipFile(path) as file:
                arrays = dict(self._arrays(file))
                labels = {name: self._labels(file, arrays, name) for name in _PARTS if name in arrays}
        except (zipfile.BadZipFile, OSError, NotImplementedError, RuntimeError, zlib.error, EOFError) as error:
            raise ValueError(f"{self.label} is not a readable npz ({error}): fetch or make it anew.") from error
        if not labels:
            raise ValueError(
                f"{self.label} has no train_images and train_labels, images and labels or the like, but "
                f"{', '.join(sorted(arrays)) or 'nothing'}: save it with arrays of these names."
            )
        self._images = {name: arrays[name] for name in labels}
        size = sum(self._checked(name, array) for name, array in self._images.items())
        if size > cache_gb * 1e9:
            raise ValueError(
                f"{self.label} has {size} bytes of images, more than cache_gb={cache_gb} allows: raise data.cache_gb."
            )
        self._place = self._named(labels)
        self.names = sorted(self._place)
        self.folders = sorted({name.rpartition("/")[0] for name in self.names} - {""})

    def _arrays(self, file: zipfile.ZipFile) -> Iterator[tuple[str, _Array]]:
        for member in file.infolist():
            refuse_member(member, self.label)
            name = member.filename.removesuffix(".npy").lower()
            with file.open(member) as content:
                try:
                    version = np.lib.format.read_magic(content)
                    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
                    shape, fortran, dtype = read[version](content)
                except (ValueError, KeyError, TypeError) as error:
                    raise self._wrong(name, f"is no array of numpy's ({str(error).splitlines()[0][:80]})") from error
                array = _Array(member, content.tell(), shape, "F" if fortran else "C", dtype)
            if dtype.hasobject or dtype.kind not in "biufUS":
                raise self._wrong(name, f"has dtype {dtype}, and only numbers and text are read")
            if math.prod(shape) * dtype.itemsize != member.file_size - array.begin:
                raise self._wrong(name, f"says that it has shape {shape}, which is not what it has")
            yield name, array

    def _wrong(self, name: str, what: str) -> ValueError:
        return ValueError(f"{self.label}: its array {name} {what}; nothing of this npz is used.")

    def _labels(self, file: zipfile.ZipFile, arrays: Mapping[str, _Array], images: str) -> list[str] | None:
        """The class of each image; None where there are no labels."""
        name = _PARTS[images][0]
        array = arrays.get(name)
        if array is None:
            return None
        count = arrays[images].shape[0] if arrays[images].shape else 0
        if array.shape not in ((count,), (count, 1)):
            raise self._wrong(name, f"has shape {array.shape}, and not a label for each of {count} images")
        if array.member.file_size > _LARGEST_LABELS:
            raise self._wrong(name, f"has more than {_LARGEST_LABELS} bytes")
        with file.open(array.member) as content:
            values = np.frombuffer(content.read(array.member.file_size)[array.begin :], array.dtype)
        if array.dtype.kind == "f":
            if not (np.isfinite(values) & (values == np.rint(values))).all():
                raise self._wrong(name, "has labels that are no whole numbers")
            values = values.astype(np.int64)
        texts = [v.decode("utf-8", "replace") if isinstance(v, bytes) else str(v) for v in values.tolist()]
        wrong = next((text for text in set(texts) if not text.strip() or "/" in text or "\0" in text), None)
        if wrong is not None:
            raise self._wrong(name, f"has the label {wrong!r}")
        return texts

    def _checked(self, name: str, array: _Array) -> int:
        """The bytes of an array of images; ValueError for one of something else."""
        shape, kind = array.shape, array.dtype.kind
        if kind not in "biuf" or len(shape) not in (3, 4) or (len(shape) == 4 and _channels(shape) is None):
            raise self._wrong(name, f"has shape {shape}, {array.dtype}: give (N, H, W) or (N, H, W, C) of numbers")
        return math.prod(shape) * array.dtype.itemsize

    def _named(self, labels: Mapping[str, list[str] | None]) -> dict[str, tuple[str, int]]:
        """The name of each image, with its array and its place there."""
        parts = {name: (_PARTS[name][1], known) for name, known in labels.items()}
        classes = [set(known) for _, known in parts.values() if known is not None]
        shared = len(classes) > 1 and len(set().union(*classes)) < sum(map(len, classes))
        if shared:
            rank_zero_info(f"{self.label}: its splits have the same classes, so all images of a class go together.")
        found: dict[str, tuple[str, int]] = {}
        for name, (split, known) in parts.items():
            for row in range(self._images[name].shape[0]):
                if known is None:
                    path = f"{split}-{row:07}" if split else f"{row:07}"
                elif shared or not split:
                    path = f"{known[row]}/{split}-{row:07}" if split else f"{known[row]}/{row:07}"
                else:
                    path = f"{split}/{known[row]}/{row:07}"
                if found.setdefault(path, (name, row)) != (name, row):
                    raise ValueError(f"{self.label} has two arrays of the same split: keep one of them.")
        return found

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_opened": {}}

    def read(self, name: str) -> NDArray[Any]:
        """The image as an array (H, W) or (H, W, C)."""
        part, row = self._place[name]
        with _INFLATING:  # the first of many threads
            if part not in self._opened:
                self._opened[part] = self._inflated(self._images[part])
        image: NDArray[Any] = self._opened[part][row]
        first = image.ndim == 3 and _channels(self._images[part].shape) == 1
        return np.moveaxis(image, 0, -1) if first else image

    def _inflated(self, array: _Array) -> NDArray[Any]:
        """The array, mapped from a temporary file without a name, which nobody can cut short."""
        if _state(self.path) != self._state:
            raise OSError(f"{self.path} has changed")
        if not math.prod(array.shape):
            return np.zeros(array.shape, array.dtype)
        with tempfile.TemporaryFile() as out:
            try:
                with zipfile.ZipFile(self.path) as file, file.open(array.member) as content:
                    content.read(array.begin)
                    self._copy(content, out)
            except (zipfile.BadZipFile, zlib.error, RuntimeError, EOFError) as error:
                raise OSError(f"damaged in the npz: {str(error) or 'it ends too early'}") from error
            return np.memmap(out, array.dtype, "r", shape=array.shape, order=array.order)

    def _copy(self, content: IO[bytes], out: IO[bytes]) -> None:
        while block := content.read(_BLOCK):
            try:
                out.write(block)
            except OSError as error:
                raise OSError(
                    f"it cannot be inflated into {tempfile.gettempdir()} ({error.strerror}): set TMPDIR to a folder "
                    f"with more room"
                ) from error
        out.flush()

    def stamp(self, name: str) -> tuple[int, int]:
        """Size and time of change of the file."""
        return self._state


def _channels(shape: tuple[int, ...]) -> int | None:
    """The axis of the channels in (N, H, W, C) or (N, C, H, W); None where there is none."""
    return next((axis for axis, counts in ((3, (1, 3, 4)), (1, (1, 3, 4))) if shape[axis] in counts), None)


def _state(path: Path) -> tuple[int, int]:
    about = path.stat()
    return about.st_size, about.st_mtime_ns
