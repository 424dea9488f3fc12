"""Images in a tar, plain or compressed by gzip or bzip2; nothing is extracted, and hostile tars are refused."""

from __future__ import annotations

import bz2
import gzip
import os
import tarfile
import tempfile
import weakref
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO, BinaryIO, NamedTuple

from fomal.data.images.image_kinds import HEAD
from fomal.data.images.source_base import LARGEST_RATIO, Source, members_by_name, wrong_path
from fomal.utils.checks import first_line
from fomal.utils.files import LARGEST, open_regular

_GZIP, _BZIP2 = b"\x1f\x8b", b"BZh"
_OTHERS = {b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstandard", b"\x04\x22\x4d\x18": "lz4"}
_LARGEST_HEADER = 2**16  # bytes that a header may have, with the long names and attributes that it may give
_MOST_MEMBERS = 10_000_000
_BLOCK = 2**20
_SLACK = 2**26  # bytes that a compressed tar may inflate to, whatever its ratio


class _Place(NamedTuple):
    offset: int
    size: int


def is_tar(path: Path) -> bool:
    """Tell a tar, compressed or not, from other files by how it begins, or by its suffix."""
    with open_regular(path) as file:
        head = file.read(512)
    return head.startswith((_GZIP, _BZIP2, *_OTHERS)) or head[257:262] == b"ustar" or path.suffix.lower() == ".tar"


class TarSource(Source):
    """A tar, read member by member into memory.

    A compressed one cannot be read in any order: it is inflated once into a temporary file without a name.

    Args:
        path: of the tar.
        setting: the argument that it was given as.
        cache_gb: how many 10**9 bytes a compressed tar may have when it is inflated.

    Raises:
        ValueError: it is no readable tar, inflates to more than `cache_gb` or to over `LARGEST_RATIO` times its size,
            or has a member with a name that leaves the root, one that is no regular file (a link, a device, a fifo, a
            file with holes), two members of one name, or a header of absurd size.
    """

    def __init__(self, path: Path, setting: str = "root", cache_gb: float = 4.0) -> None:
        self.where, self.setting = str(path), setting
        self.path, self.cache_gb = path, cache_gb
        self._state = _state(path)
        self._file: IO[bytes] | None = None
        members = self._checked(self._headers(self._opened()))
        self._members, self.folders = members_by_name(self.label, "tar", members)
        self.names = sorted(self._members)

    def _checked(self, members: Iterable[tarfile.TarInfo]) -> Iterator[tuple[str, bool, _Place]]:
        for member in members:
            _refuse(member, self.label)
            name = PurePosixPath(member.name).as_posix()
            if name != ".":
                yield name, member.isdir(), _Place(member.offset_data, member.size)

    def _headers(self, file: IO[bytes]) -> Iterator[tarfile.TarInfo]:
        count = 0
        try:
            with tarfile.TarFile(fileobj=_Headers(file), encoding="utf-8") as tar:  # type: ignore[arg-type]
                while (member := tar.next()) is not None:
                    tar.members.clear()  # type: ignore[attr-defined] # it would keep them all
                    if (count := count + 1) > _MOST_MEMBERS:
                        raise tarfile.ReadError(f"it has more than {_MOST_MEMBERS} members")
                    if member.size < 0:
                        raise tarfile.ReadError(f"it has a member of {member.size} bytes")
                    yield member
        except Exception as error:  # damaged tars raise almost anything
            raise ValueError(
                f"{self.label} is not a readable tar ({first_line(error)}): fetch or make it anew."
            ) from error

    def _opened(self) -> IO[bytes]:
        """The tar, inflated; a process that was given this object opens it itself."""
        if self._file is None:
            if _state(self.path) != self._state:
                raise OSError(f"{self.path} has changed")
            self._file = self._inflated()
            weakref.finalize(self, self._file.close)
        return self._file

    def _inflated(self) -> IO[bytes]:
        packed = open_regular(self.path)
        head = packed.read(6)
        packed.seek(0)
        for magic, method in _OTHERS.items():
            if head.startswith(magic):
                raise ValueError(f"{self.label} is compressed by {method}, which is not read: decompress it.")
        if not head.startswith((_GZIP, _BZIP2)):
            return packed
        with packed, gzip.GzipFile(fileobj=packed) if head.startswith(_GZIP) else bz2.BZ2File(packed) as stream:
            return self._copied(stream, packed)

    def _copied(self, stream: gzip.GzipFile | bz2.BZ2File, packed: BinaryIO) -> IO[bytes]:
        """A copy of `stream`, which inflates `packed`, in a file that vanishes when it is closed."""
        size = 0
        out: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 # closed when it is not needed any more
        try:
            while block := self._next(stream):
                size += len(block)
                if size > self.cache_gb * 1e9:
                    raise ValueError(
                        f"{self.label} inflates to more than cache_gb={self.cache_gb} allows: raise data.cache_gb, or "
                        f"decompress it."
                    )
                if size > _SLACK + LARGEST_RATIO * packed.tell():
                    raise ValueError(
                        f"{self.label} inflates to more than {LARGEST_RATIO} times its size, as no honest tar of "
                        f"images does: nothing of it is used."
                    )
                self._write(out, block)
            out.seek(0)
        except BaseException:
            out.close()
            raise
        return out

    def _next(self, stream: gzip.GzipFile | bz2.BZ2File) -> bytes:
        try:
            return stream.read(_BLOCK)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(
                f"{self.label} is not a readable tar ({first_line(error)}): fetch or make it anew."
            ) from error

    def _write(self, out: IO[bytes], block: bytes) -> None:
        try:
            out.write(block)
        except OSError as error:
            raise OSError(
                f"{self.label} cannot be inflated into {tempfile.gettempdir()} ({error.strerror}): decompress it, or "
                f"set TMPDIR to a folder with more room."
            ) from error

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_file": None}

    def read(self, name: str) -> bytes:
        """The bytes of a member."""
        size = self._members[name].size
        if size > LARGEST:
            raise OSError(f"it has {size} bytes, more than the {LARGEST} allowed")
        content = self._begin(name, size)
        if len(content) < size:
            raise OSError("damaged in the tar: it ends too early")
        return content

    def head(self, name: str) -> bytes:
        """The first bytes of a member."""
        return self._begin(name, min(HEAD, self._members[name].size))

    def _begin(self, name: str, size: int) -> bytes:
        """Read without moving the file's position, which threads and forked processes share."""
        return os.pread(self._opened().fileno(), size, self._members[name].offset)

    def stamp(self, name: str) -> tuple[int, int]:
        """Size of the member, and time of change of the tar."""
        return self._members[name].size, self._state[1]


class _Headers:
    """What `tarfile` reads of a file: headers, one after the other; raises ReadError for any other wish."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.furthest = file, 0

    def tell(self) -> int:
        return self.file.tell()

    def seek(self, place: int) -> int:
        if place < self.furthest - 1:
            raise tarfile.ReadError("its members overlap")  # and might follow each other in a circle
        return self.file.seek(place)

    def read(self, size: int) -> bytes:
        if not 0 <= size <= _LARGEST_HEADER:
            raise tarfile.ReadError(f"it has a header of {size} bytes")
        content = self.file.read(size)
        self.furthest = self.file.tell()
        return content


def _state(path: Path) -> tuple[int, int]:
    about = path.stat()
    return about.st_size, about.st_mtime_ns


def _refuse(member: tarfile.TarInfo, label: str) -> None:
    """Raise ValueError for a member that no honest tar of images has."""
    wrong = wrong_path(member.name, "tar")
    if member.issym() or member.islnk():
        wrong = "is a link"
    elif member.issparse():
        wrong = "is a file with holes"
    elif not (member.isreg() or member.isdir()):
        wrong = "is neither a file nor a folder"
    if wrong:
        raise ValueError(f"{label}: its member {member.name!r} {wrong}; nothing of this tar is used.")
