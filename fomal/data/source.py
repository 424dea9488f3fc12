"""Named image files in a folder, a zip or arrays; nothing is ever extracted, and hostile zips are refused."""

from __future__ import annotations

import errno
import os
import stat
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from fomal.data.image_kinds import HEAD, not_an_image
from fomal.files import LARGEST, open_regular, read_regular

MOST_WAYS = 16
"""Paths on which one folder may be reached by links."""
LARGEST_RATIO = 100
"""How many times its compressed size a member of a zip may have; images hardly compress."""
_SMALL = 2**20  # bytes; a member no larger than this is no bomb, whatever its ratio: drawings do compress
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # of others zipfile inflates without a bound
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
        """What to call it in messages, e.g. root='data/images'."""
        return f"{self.setting}={self.where!r}"

    @abstractmethod
    def read(self, name: str) -> Content:
        """The content of a file.

        Raises:
            OSError, zipfile.BadZipFile: it cannot be read.
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
            inside = {name: _identity(Path(path, name)) for name in folders if not _is_hidden(name)}
            folders[:] = [name for name, identity in inside.items() if identity not in chain]
            chains |= {os.path.join(path, name): chain | {inside[name]} for name in folders}
            self.folders += [(place / name).as_posix() for name in folders]
            self.names += [(place / name).as_posix() for name in files if not _is_hidden(name)]
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


class FileSource(Source):
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

    @property
    def left_out(self) -> dict[str, str]:
        """None."""
        return {}

    @property
    def images(self) -> list[str]:
        """All of them, whatever their names."""
        return self.names

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


class ZipSource(Source):
    """A zip, read member by member into memory.

    Raises:
        ValueError: it is no readable zip, or has a member with a name that leaves the root, a link, an encrypted
            member, two members of one name, one compressed by another method than deflate, or one larger than
            `LARGEST_RATIO` times its compressed size.
    """

    def __init__(self, path: Path, setting: str = "root") -> None:
        self.where, self.setting = str(path), setting
        self.path = path
        self._open: tuple[int, zipfile.ZipFile] | None = None
        try:
            members = self._zip().infolist()
        except (zipfile.BadZipFile, OSError, NotImplementedError, UnicodeDecodeError) as error:
            raise ValueError(f"{self.label} is not a readable zip ({error}): fetch or make it anew.") from error
        self._members: dict[str, zipfile.ZipInfo] = {}
        folders: set[str] = set()
        for member in members:
            _refuse(member, self.label)
            name = member.filename.rstrip("/")
            if any(map(_is_hidden, name.split("/"))):
                continue
            folders.update(str(parent) for parent in PurePosixPath(name).parents if parent.name)
            if member.is_dir():
                folders.add(name)
                continue
            if name in self._members:
                raise ValueError(f"{self.label} has two members {name!r}: make the zip anew, with one of them.")
            self._members[name] = member
        self.names = sorted(self._members)
        self.folders = sorted(folders)

    def _zip(self) -> zipfile.ZipFile:
        """The open zip; each process has its own, since a forked file shares its position."""
        if self._open is None or self._open[0] != os.getpid():
            self._open = os.getpid(), zipfile.ZipFile(open_regular(self.path))
        return self._open[1]

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_open": None}

    def read(self, name: str) -> bytes:
        """The bytes of a member, at most as many as it claims to have."""
        size = self._members[name].file_size
        if size > LARGEST:
            raise OSError(errno.EFBIG, f"it has {size} bytes, more than the {LARGEST} allowed")
        return self._begin(name, size)

    def head(self, name: str) -> bytes:
        """The first bytes of a member."""
        return self._begin(name, HEAD)

    def _begin(self, name: str, size: int) -> bytes:
        try:
            with self._zip().open(self._members[name]) as file:
                return file.read(size)
        except (zipfile.BadZipFile, zlib.error, RuntimeError, EOFError, ValueError) as error:
            raise OSError(f"damaged in the zip: {str(error) or 'it ends too early'}") from error

    def stamp(self, name: str) -> tuple[int, int]:
        """Size and checksum."""
        return self._members[name].file_size, self._members[name].CRC


class ArraySource(Source):
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

    @property
    def left_out(self) -> dict[str, str]:
        """None."""
        return {}

    @property
    def images(self) -> list[str]:
        """All of them."""
        return self.names


def open_source(root: str, setting: str = "root") -> Source:
    """The files of a folder or a zip, given as the argument `setting`.

    Raises:
        FileNotFoundError: there is neither.
        ValueError: the zip is damaged or hostile.
    """
    path = Path(root).expanduser()
    if path.is_dir():
        return FolderSource(path, setting)
    if not path.is_file():
        what = "is neither a folder nor a regular file" if path.exists() else "does not exist"
        raise FileNotFoundError(f"{setting}={root!r} {what}: give a folder or a zip, tar or npz with the images.")
    return ZipSource(path, setting)


def _head(path: Path) -> bytes:
    with open_regular(path) as file:
        return file.read(HEAD)


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name in _NOT_DATA


def _identity(path: Path) -> tuple[int, int]:
    """What is the same for a folder and links to it."""
    about = path.stat()
    return about.st_dev, about.st_ino


def _is_foreign(path: str) -> bool:
    """Whether it is absolute, or another system's path."""
    return path.startswith("/") or "\\" in path or "\0" in path or ":" in path.partition("/")[0]


def _refuse(member: zipfile.ZipInfo, label: str) -> None:
    """Raise ValueError for a member that no honest zip of images has."""
    name, wrong = member.orig_filename, ""
    paths = name, member.filename  # the second from the field "Unicode path", where there is one
    if any(map(_is_foreign, paths)):
        wrong = "has an absolute or a foreign path"
    elif any(".." in path.split("/") for path in paths):
        wrong = "leaves the zip's root"
    elif stat.S_ISLNK(member.external_attr >> 16):
        wrong = "is a link"
    elif member.flag_bits & 1:
        wrong = "is encrypted"
    elif member.compress_type not in _METHODS:
        wrong = "is compressed by another method than deflate"
    elif member.file_size > max(_SMALL, LARGEST_RATIO * member.compress_size):
        ratio = member.file_size / max(member.compress_size, 1)
        wrong = f"inflates to {ratio:.0f} times its size, more than {LARGEST_RATIO}"
    if wrong:
        raise ValueError(f"{label}: its member {name!r} {wrong}; nothing of this zip is used.")
