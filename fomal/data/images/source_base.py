"""Named image files, and those of a folder, given by their paths, or held as arrays."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path, PurePosixPath
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from fomal.data.images.image_kinds import HEAD, not_an_image
from fomal.utils.files import open_regular, read_regular

_Kept = TypeVar("_Kept")

MOST_WAYS = 16
"""Paths on which one folder may be reached by links."""
LARGEST_RATIO = 100
"""How many times its compressed size a member of an archive may have; images hardly compress."""
_NOT_DATA = ("__MACOSX",)  # what macOS puts beside the files of a zip

Content = bytes | NDArray[np.uint8]
"""A file's bytes, or an image as an array (H, W, C)."""


class Source(ABC):
    """Files by name: paths relative to the source's root, with forward slashes.

    Attributes:
        where: its path.
        setting: the argument that it was given as, for messages.
        names: sorted names of all files, hidden ones left out.
        folders: sorted names of all folders below the root.
    """

    where: str
    setting: str = "root"
    names: list[str]
    folders: list[str]

    @property
    def label(self) -> str:
        """The name to call it by in messages, e.g. root='data/images'."""
        return f"{self.setting}={self.where!r}"

    @abstractmethod
    def read(self, name: str) -> Content:
        """The content of a file.

        Raises:
            OSError: it cannot be read.
        """

    @abstractmethod
    def stamp(self, name: str) -> tuple[int, int]:
        """Numbers that change when the file does, without opening it."""

    def head(self, name: str) -> bytes:
        """The first `HEAD` bytes of a file; raises as `read` does."""
        return bytes(self.read(name)[:HEAD])

    @cached_property
    def left_out(self) -> dict[str, str]:
        """The files that are no images, by name, with a word for what each is; see `not_an_image`."""
        kinds = {name: not_an_image(name, partial(self.head, name)) for name in self.names}
        return {name: kind for name, kind in kinds.items() if kind is not None}

    @property
    def images(self) -> list[str]:
        """The files that are images by their suffix or, without a suffix of images, by their content."""
        return [name for name in self.names if name not in self.left_out]


class ImagesAlone(Source):
    """Files that are images all, whatever their names."""

    @cached_property
    def left_out(self) -> dict[str, str]:
        """None."""
        return {}


def members_by_name(
    label: str, kind: str, members: Iterable[tuple[str, bool, _Kept]]
) -> tuple[dict[str, _Kept], list[str]]:
    """The members of an archive that are files, and the sorted names of all folders; hidden ones are left out.

    Args:
        label: what to call the archive in messages.
        kind: what it is, e.g. zip.
        members: the name of each, whether it is a folder, and what is kept of it.

    Raises:
        ValueError: two have one name.
    """
    files: dict[str, _Kept] = {}
    folders: set[str] = set()
    hidden: dict[str, bool] = {}  # by folder
    for name, is_folder, kept in members:
        folder, _, base = name.rpartition("/")
        if folder not in hidden:
            hidden[folder] = any(map(is_hidden, folder.split("/")))
            if not hidden[folder]:
                folders.update(str(parent) for parent in PurePosixPath(folder, "_").parents if parent.name)
        if hidden[folder] or is_hidden(base):
            continue
        if is_folder:
            folders.add(name)
            continue
        if name in files:
            raise ValueError(f"{label} has two members {name!r}: make the {kind} anew, with one of them.")
        files[name] = kept
    return files, sorted(folders)


class FolderSource(Source):
    """A folder; links in it are followed, as far as they do not run in circles.

    Raises:
        ValueError: one folder is reached on more than `MOST_WAYS` ways, which links can multiply without end.
    """

    def __init__(self, root: Path, setting: str = "root") -> None:
        self.where, self.setting = str(root), setting
        self.root = root
        self.names, self.folders = [], []
        chains = {str(root): {_identity(root)}}  # of each folder, itself and those that it lies in
        ways = Counter[tuple[int, int]]()
        for path, folders, files in os.walk(root, followlinks=True):
            ways[here := _identity(Path(path))] += 1
            if ways[here] > MOST_WAYS:
                raise ValueError(f"{self.label}: links lead to {path} on more than {MOST_WAYS} ways: remove them.")
            chain, place = chains.pop(path), Path(path).relative_to(root)
            inside = {name: _identity(Path(path, name)) for name in folders if not is_hidden(name)}
            folders[:] = [name for name, identity in inside.items() if identity not in chain]
            chains |= {os.path.join(path, name): chain | {inside[name]} for name in folders}
            self.folders += [(place / name).as_posix() for name in folders]
            self.names += [(place / name).as_posix() for name in files if not is_hidden(name)]
        self.names.sort()
        self.folders.sort()

    def read(self, name: str) -> bytes:
        """The bytes of a file."""
        return read_regular(self.root / name)

    def head(self, name: str) -> bytes:
        """The first bytes of a file."""
        return _head(self.root / name)

    def stamp(self, name: str) -> tuple[int, int]:
        """Size and time of change; of a link to nowhere zeros."""
        try:
            about = (self.root / name).stat()
        except OSError:
            return 0, 0  # reading it fails later, by name
        return about.st_size, about.st_mtime_ns


class FileSource(ImagesAlone):
    """Files by their paths, as given.

    Raises:
        FileNotFoundError: one does not exist.
    """

    def __init__(self, paths: Sequence[str], setting: str = "root") -> None:
        lacking = [path for path in paths if not Path(path).is_file()]
        if lacking:
            what = "is no regular file" if Path(lacking[0]).exists() else "does not exist"
            raise FileNotFoundError(f"{setting}={lacking[0]!r} {what}: give files, or one folder or zip.")
        self.where, self.setting = f"{len(paths)} files", setting
        self.names, self.folders = list(dict.fromkeys(paths)), []

    def read(self, name: str) -> bytes:
        """The bytes of a file."""
        return read_regular(Path(name))

    def head(self, name: str) -> bytes:
        """The first bytes of a file."""
        return _head(Path(name))

    def stamp(self, name: str) -> tuple[int, int]:
        """Size and time of change."""
        about = Path(name).stat()
        return about.st_size, about.st_mtime_ns


class ArraySource(ImagesAlone):
    """Images that a data set's own format holds as arrays.

    Args:
        where: what to call the source in messages.
        names: a name for each image.
        load: gives N arrays (H, W, C) uint8, in the order of the names; called when the first is read.
        stamp: numbers that change when the file behind the arrays does.
    """

    def __init__(
        self, where: str, names: list[str], load: Callable[[], Sequence[NDArray[np.uint8]]], stamp: tuple[int, int]
    ) -> None:
        self.where = where
        self.names, self.folders = names, sorted({name.rpartition("/")[0] for name in names})
        self._place = {name: i for i, name in enumerate(names)}
        self._load, self._stamp = load, stamp
        self._arrays: Sequence[NDArray[np.uint8]] | None = None

    def read(self, name: str) -> NDArray[np.uint8]:
        """The image as an array (H, W, C)."""
        if self._arrays is None:
            self._arrays = self._load()
        return self._arrays[self._place[name]]

    def stamp(self, name: str) -> tuple[int, int]:
        """That of the file they come from."""
        return self._stamp


class JoinedSource(ImagesAlone):
    """Images of several sources as one.

    Args:
        where: what to call the source in messages.
        files: the source of each, and its name there, by its name here.
    """

    def __init__(self, where: str, files: Mapping[str, tuple[Source, str]]) -> None:
        self.where = where
        self.names, self.folders = sorted(files), sorted({name.rpartition("/")[0] for name in files})
        self._files = files

    def read(self, name: str) -> Content:
        """The content of a file."""
        source, there = self._files[name]
        return source.read(there)

    def stamp(self, name: str) -> tuple[int, int]:
        """That of the source."""
        source, there = self._files[name]
        return source.stamp(there)


def _head(path: Path) -> bytes:
    with open_regular(path) as file:
        return file.read(HEAD)


def is_hidden(name: str) -> bool:
    """Tell files that are no data, by the name of the file or of a folder that it is in."""
    return name.startswith(".") or name in _NOT_DATA


def _identity(path: Path) -> tuple[int, int]:
    """What is the same for a folder and links to it."""
    about = path.stat()
    return about.st_dev, about.st_ino


def wrong_path(path: str, archive: str) -> str:
    """Say what is wrong with a member's path in an archive, a "zip" or "tar"; empty where nothing is."""
    if path.startswith("/") or "\\" in path or "\0" in path or ":" in path.partition("/")[0]:
        return "has an absolute or a foreign path"
    return f"leaves the {archive}'s root" if ".." in path.split("/") else ""
