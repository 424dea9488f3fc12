"""Mini-ImageNet (Vinyals et al. 2016) with the classes of Ravi & Larochelle 2017, in every form it is found."""

from __future__ import annotations

import hashlib
import importlib
import pickle
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fomal.data.images.cache import cache_folder, read_arrays, write_arrays
from fomal.data.images.image_files import ImageFilesDataModule
from fomal.data.images.image_format import Fit
from fomal.data.images.listing import Listed, Listing, by_folders, enumerated, sorted_listing, split_named
from fomal.data.images.manifest import Manifest, read_manifests
from fomal.data.images.partition import partition
from fomal.data.images.pickles import load_pickle
from fomal.data.images.source import ArraySource, Source, open_source
from fomal.tasks.sampler import SPLITS

CLASSES = {"train": 64, "val": 16, "test": 20}
IMAGES = 600  # of each class
_FORMS = (
    "folders train/, val/ and test/ with a folder for each class; images and train.csv, val.csv and test.csv; or "
    "mini-imagenet-cache-train.pkl, -val.pkl and -test.pkl"
)


class MiniImageNetDataModule(ImageFilesDataModule):
    """N-way K-shot tasks from Mini-ImageNet: 64, 16 and 20 classes of 600 images (Nichol et al. 2018, section 6).

    Args:
        root: folder or zip with one of these forms: class folders below train/, val/ and test/, as the released code
            lays them out; images and the three CSV files of Ravi & Larochelle; or a folder with the three pickles
            mini-imagenet-cache-{train,val,test}.pkl, which are read without running what is in them.
        download: fetch the pickles that `root` lacks, as learn2learn does; needs `fomal[learn2learn]`.
        image_size: see `ImageFilesDataModule`.
        fit: likewise; the released code stretches.
        kwargs: likewise.
    """

    one_class_each = False  # used as published

    def __init__(
        self,
        root: str = "data/mini-imagenet",
        download: bool = False,
        image_size: int = 84,
        fit: Fit = "stretch",
        **kwargs: Any,
    ) -> None:
        super().__init__(root, image_size=image_size, fit=fit, **kwargs)
        self.download = download

    def prepare_data(self) -> None:
        """Download what is missing, and build the cache; once per machine."""
        folder = Path(self.root).expanduser()
        if self.download and not folder.is_file() and find_form(folder) is None:
            download_pickles(folder)
        super().prepare_data()

    def find(self) -> tuple[Source, Listing]:
        """The files, and their classes.

        Raises:
            FileNotFoundError: `root` has none of the forms, or a part of one.
            ValueError: classes or images are missing.
        """
        path = Path(self.root).expanduser()
        form = find_form(path)
        if form is None:
            found = _incomplete(path) or "has none of its forms"
            raise FileNotFoundError(
                f"root={self.root!r} {found}: Mini-ImageNet is {_FORMS}. Put one there, or set data.download: true."
            )
        if form == "pickles":
            source, listing = read_pickles(_pickles(path), self.cache_dir)
        else:
            source = open_source(self.root)
            listing = by_folders(source) if form == "folders" else _by_three_csvs(source, self.on_error)
        check_counts(self.root, listing.files)
        return source, listing

    def divide(self, files: Sequence[Listed]) -> dict[str, list[str]]:
        """The classes of each split, as published."""
        return partition(files, "given")


def check_counts(root: str, files: Sequence[Listed]) -> None:
    """Raise ValueError, saying what is missing, unless there are 64, 16 and 20 classes of 600 images."""
    images = Counter((file.split, file.label) for file in files)
    wrong = []
    for split, classes in CLASSES.items():
        found = [label for part, label in images if part == split]
        if len(found) != classes:
            wrong.append(f"{split} has {len(found)} of {classes} classes")
        few = [f"{label}: {images[split, label]}" for label in found if images[split, label] != IMAGES]
        if few:
            wrong.append(f"{split} has classes of other than {IMAGES} images, {enumerated(few, 3)}")
    if wrong:
        raise ValueError(f"root={root!r} is not all of Mini-ImageNet: {'; '.join(wrong)}. Complete it from its origin.")


def find_form(path: Path) -> str | None:
    """Find which of the forms a folder or zip has: "pickles", "csv", "folders", or None."""
    if path.is_dir() and len(_pickles(path)) == len(SPLITS):
        return "pickles"
    if not path.exists():
        return None
    names = open_source(str(path)).names
    if all(_csv_of(names, split) for split in SPLITS):
        return "csv"
    return "folders" if _split_folders(names) == list(SPLITS) else None


def _split_folders(names: Sequence[str]) -> list[str]:
    """The splits that have folders with folders in them."""
    parts = {part for name in names for part in name.split("/")[:-2]}
    found = set(map(split_named, parts))
    return [split for split in SPLITS if split in found]


def _incomplete(path: Path) -> str:
    """What a folder has, if a part of a form."""
    if not path.exists():
        return "does not exist"
    found = _pickles(path) if path.is_dir() else {}
    lacking = [split for split in SPLITS if split not in found]
    if found:
        return f"has the pickles of {', '.join(found)}, but not of {', '.join(lacking)}"
    names = open_source(str(path)).names
    tables = [split for split in SPLITS if _csv_of(names, split)]
    if tables:
        return f"has a CSV file of {', '.join(tables)} alone"
    folders = _split_folders(names)
    return f"has the folder {', '.join(folders)} alone" if folders else ""


def _csv_of(names: Sequence[str], split: str) -> str | None:
    tables = [name for name in names if name.rpartition("/")[2] == f"{split}.csv"]
    return min(tables, key=len, default=None)


def _by_three_csvs(source: Source, on_error: str) -> Listing:
    manifests = []
    for split in SPLITS:
        table = _csv_of(source.names, split)
        assert table is not None  # find_form has seen it
        content = source.read(table)
        assert isinstance(content, bytes)  # of a file
        where = f"labels={f'{source.where}/{table}'!r}"
        manifests.append(Manifest(content, where, split, below=table.rpartition("/")[0]))
    return read_manifests(source, manifests, on_error=on_error)


def _pickles(folder: Path) -> dict[str, Path]:
    """The pickles in a folder, by split; learn2learn writes "validation" for "val"."""
    found: dict[str, Path] = {}
    for split in SPLITS:
        for name in (split, "validation") if split == "val" else (split,):
            path = folder / f"mini-imagenet-cache-{name}.pkl"
            if path.is_file():
                found.setdefault(split, path)
    return found


class _Part(NamedTuple):
    """A pickle's content: images (N, H, W, 3) uint8, and the places of each class's images."""

    images: NDArray[np.uint8]
    places: Mapping[str, Sequence[int]]


def read_pickles(paths: Mapping[str, Path], cache_dir: str | None) -> tuple[Source, Listing]:
    """The images of the pickles; which there are is cached, so that they need not be read again."""
    stats = [(split, path.stat().st_size, path.stat().st_mtime_ns) for split, path in paths.items()]
    stamp = hashlib.sha256(repr(stats).encode()).digest()
    table = cache_folder(cache_dir) / f"mini-imagenet-{stamp.hex()[:16]}.cache"
    about = read_arrays(table)
    parts: list[_Part] = []
    if about is None:
        parts = [_read_pickle(path) for path in paths.values()]
        about = _table(dict(zip(paths, parts, strict=True)))
        with suppress(OSError):  # load_images warns of a cache that cannot be written
            write_arrays(table, about)
    names, rows = about["names"].tolist(), about["rows"].tolist()

    def load() -> list[NDArray[np.uint8]]:
        images = [image for part in parts or map(_read_pickle, paths.values()) for image in part.images]
        return [images[row] for row in rows]

    where = next(iter(paths.values())).parent
    source = ArraySource(str(where), names, load, (int.from_bytes(stamp[:8], "big"), 0))
    files = [Listed(name, name.split("/")[1], name.split("/")[0]) for name in names]
    return source, sorted_listing(files)


def _table(parts: Mapping[str, _Part]) -> dict[str, Any]:
    """A name "split/class/number" for each image, and its place when the images of all pickles follow each other."""
    names, rows, start = [], [], 0
    for split, part in parts.items():
        for label, places in part.places.items():
            names += [f"{split}/{label}/{place:05}" for place in places]
            rows += [start + place for place in places]
        start += len(part.images)
    return {"names": np.array(names), "rows": np.array(rows, np.int64)}


def _read_pickle(path: Path) -> _Part:
    try:
        with path.open("rb") as file:
            content = load_pickle(file)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path} cannot be used: {error}; fetch it anew.") from error
    try:
        images, places = content["image_data"], content["class_dict"]
        plain = {str(label): [int(place) for place in members] for label, members in places.items()}
        good = images.ndim == 4 and images.shape[3] == 3 and images.dtype == np.uint8
    except (AttributeError, LookupError, TypeError, ValueError):  # other objects
        good = False
    if not good:
        raise ValueError(
            f"{path} cannot be used: it has no image_data (N, H, W, 3) uint8 and class_dict of places; fetch it anew."
        )
    if any(not 0 <= place < len(images) for members in plain.values() for place in members):
        raise ValueError(f"{path} cannot be used: its class_dict names images that it lacks; fetch it anew.")
    return _Part(np.asarray(images), plain)


def download_pickles(folder: Path) -> None:
    """Let learn2learn fetch the three pickles into `folder`.

    Raises:
        ModuleNotFoundError: learn2learn is not installed.
        RuntimeError: it could not.
    """
    try:
        theirs: Any = importlib.import_module("learn2learn.vision.datasets.mini_imagenet")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "download=True needs learn2learn, which fetches Mini-ImageNet: pip install fomal[learn2learn]."
        ) from error
    folder.mkdir(parents=True, exist_ok=True)
    own = theirs.pickle
    theirs.pickle = SimpleNamespace(load=load_pickle, UnpicklingError=pickle.UnpicklingError)  # it opens what it gets
    try:
        for mode in ("train", "validation", "test"):
            theirs.MiniImagenet(str(folder), mode, download=True)
    except Exception as error:  # requests', pickle's and its own
        raise RuntimeError(
            f"download=True could not fetch Mini-ImageNet by learn2learn ({error}): put it into "
            f"root={str(folder)!r} by hand, as {_FORMS}."
        ) from error
    finally:
        theirs.pickle = own
