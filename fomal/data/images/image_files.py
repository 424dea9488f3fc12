"""The base of datamodules over image files: found, checked, decoded once, grouped by class."""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Container, Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from fomal.data.images.class_images import ClassImages, ImageDataModule
from fomal.data.images.image_format import MAX_PIXELS, Color, Fit, ImageFormat, Resample
from fomal.data.images.levels import ValueRange
from fomal.data.images.listing import Listed, Listing
from fomal.data.images.selection import tell_left_out
from fomal.data.images.source import Source
from fomal.data.images.store import Store, load_images
from fomal.utils.checks import height_and_width, nonnegative, one_of
from fomal.utils.output import rank_zero_warn

_SHOWN = 20  # problems named in a message
_Prepared = tuple[Source, Listing, Store, list[int]]


class ImageFilesDataModule(ImageDataModule):
    """N-way K-shot tasks from image files of any size; a data set says in `find` and `divide` what they are.

    Files are read and decoded once, into a cache of pixels where it fits `cache_gb`; if it does not, or
    cannot be written, episodes decode the images they need, and are the same.

    Args:
        root: folder or zip with the images.
        image_size: height and width of the images, or both, in pixels.
        color: see `fomal.data.images.image_format.ImageFormat`, as for the next eight.
        fit: "crop", "stretch" or "pad" another aspect ratio.
        resample: how sizes are changed.
        background: grey level below transparent images.
        mean: subtracted from values in [0, 1].
        std: what they are divided by then.
        max_pixels: larger files are refused.
        value_range: of 16-bit images and the like, what becomes black and what white.
        cache_dir: folder for the decoded images; None means `$XDG_CACHE_HOME/fomal` or `~/.cache/fomal`.
        cache_gb: the largest cache, in 10**9 bytes; 0 decodes always.
        on_error: what to do about files that cannot be used (damaged, of another kind than their name says, in two
            classes) and classes without a file: "raise" names them all, "skip" warns and leaves them out.
        kwargs: see `ImageDataModule`.

    Attributes:
        class_names: the names of each split's classes, before `rotations` and `new_classes`; after `setup`.
        one_class_each: whether one image in two classes is a fault.
    """

    one_class_each: ClassVar[bool] = True
    class_names: dict[str, list[str]]
    image_format: ImageFormat

    def __init__(
        self,
        root: str,
        image_size: int | tuple[int, int] = 84,
        color: Color = "rgb",
        fit: Fit = "crop",
        resample: Resample = "bilinear",
        background: int = 255,
        mean: list[float] | None = None,
        std: list[float] | None = None,
        max_pixels: int = MAX_PIXELS,
        value_range: ValueRange = None,
        cache_dir: str | None = None,
        cache_gb: float = 4.0,
        on_error: Literal["raise", "skip"] = "raise",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        nonnegative(cache_gb=cache_gb)
        one_of(("raise", "skip"), on_error=on_error)
        height, width = height_and_width(image_size)
        values = mean or (0.0,), std or (1.0,)
        self.image_format = ImageFormat(
            height, width, color, fit, resample, background, max_pixels, *values, value_range
        )
        self.root = root
        self.cache_dir = cache_dir
        self.cache_gb = cache_gb
        self.on_error = on_error
        self.class_names = {}
        self._prepared: _Prepared | None = None  # from `prepare_data` until `load`

    @property
    def file_format(self) -> ImageFormat:
        """The format of the data set's own files, which may refuse files that `image_format` does not."""
        return self.image_format

    @abstractmethod
    def find(self) -> tuple[Source, Listing]:
        """The files, and their classes."""

    @abstractmethod
    def divide(self, files: Sequence[Listed]) -> dict[str, list[str]]:
        """The classes of each split."""

    def prepare_data(self) -> None:
        """Read every file once, and build the cache; once per machine."""
        source, listing = self.find()
        tell_left_out(source.label, listing.left_out)
        self._check_listing(listing)  # what is wrong with it is found before hours of decoding
        self._prepared = source, listing, *self._load_images(source, listing, verify=True)

    def _check_listing(self, listing: Listing) -> None:
        images = Counter(file.label for file in listing.files)
        counts = {split: [images[label] for label in labels] for split, labels in self.divide(listing.files).items()}
        if self.on_error == "skip":  # a small class may vanish, if none of its files can be used
            most = {split: max(each) for split, each in counts.items()}
            enough = {split for split in most if most[split] >= sum(self.examples(split))}
            counts = {split: [most[split]] * len(each) if split in enough else each for split, each in counts.items()}
        self.check_counts(counts)

    def load(self) -> dict[str, ClassImages]:
        """The classes of each split.

        Raises:
            ValueError: files cannot be used, and `on_error` is "raise"; or none can.
        """
        if self._prepared is None:
            source, listing = self.find()
            store, kept = self._load_images(source, listing)
        else:
            source, listing, store, kept = self._prepared
            self._prepared = None
        if not kept:
            raise ValueError(f"{source.label} has no image that can be used.")
        files = [listing.files[i] for i in kept]
        counts = Counter(file.label for file in files)  # files of a class follow each other
        everything = ClassImages.of(store.images, torch.tensor(list(counts.values())), torch.tensor(kept))
        place = {label: i for i, label in enumerate(counts)}
        # Divided are all classes, so that it does not depend on damage which of them are trained on.
        divided = self.divide(listing.files)
        left = {split: [label for label in labels if label in place] for split, labels in divided.items()}
        self.class_names = {split: labels for split, labels in left.items() if labels}
        return {
            split: everything.select(torch.tensor([place[label] for label in labels]))
            for split, labels in self.class_names.items()
        }

    def _load_images(self, source: Source, listing: Listing, verify: bool = False) -> tuple[Store, list[int]]:
        """The images, and which of the files can be used."""
        names = [file.name for file in listing.files]
        store = load_images(source, names, self.file_format, self.cache_dir, self.cache_gb, verify)
        digests = store.digests if self.one_class_each else None
        return store, usable(source, listing, store.problems, digests, self.on_error)


def usable(
    source: Source, listing: Listing, problems: Mapping[str, str], digests: NDArray[np.uint8] | None, on_error: str
) -> list[int]:
    """List which files can be used: those without a problem that are in one class only.

    Args:
        source: the files.
        listing: their classes.
        problems: what is wrong with files, by name.
        digests: (N, 16), equal for files of equal content; None where one image may be in two classes.
        on_error: "raise" or "skip".

    Raises:
        ValueError: with "raise", some cannot, or a class has none.
    """
    twice = {} if digests is None else _in_two_classes(listing.files, digests, problems)
    wrong = {**problems, **twice}
    left = {file.label for file in listing.files if file.name not in wrong}
    empty = sorted({*listing.empty, *(file.label for file in listing.files)} - left)
    report(source.label, wrong, empty, on_error)
    return [i for i, file in enumerate(listing.files) if file.name not in wrong]


def _in_two_classes(files: Sequence[Listed], digests: NDArray[np.uint8], problems: Container[str]) -> dict[str, str]:
    """Files of equal content in different classes, by name, with what is wrong."""
    _, inverse, counts = np.unique(digests, axis=0, return_inverse=True, return_counts=True)
    groups: dict[int, list[Listed]] = {}
    for row in (counts[inverse] > 1).nonzero()[0].tolist():
        if files[row].name not in problems:
            groups.setdefault(int(inverse[row]), []).append(files[row])
    found = {}
    for group in groups.values():
        for file in group:
            others = [other for other in group if other.label != file.label]
            if others:
                found[file.name] = f"the same image as {others[0].name}, of another class"
    return found


def report(where: str, problems: dict[str, str], empty: Sequence[str], on_error: str) -> None:
    """Raise ValueError, or warn, about files that cannot be used and classes without a file.

    Args:
        where: what to call their source, e.g. its `label`.
        problems: what is wrong with which file.
        empty: the classes.
        on_error: "raise" or "skip".
    """
    wrong = [f"{name} ({reason})" for name, reason in problems.items()]
    wrong += [f"{label} (a class without images)" for label in empty]
    if not wrong:
        return
    more = f"; and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
    what = f"{where} has {len(wrong)} that cannot be used: {'; '.join(wrong[:_SHOWN])}{more}"
    if on_error == "raise":
        raise ValueError(f"{what}: mend or remove them, or set on_error: skip to leave them out.")
    rank_zero_warn(f"{what}: they are left out.")
