"""Images in a zip; nothing is extracted, and hostile zips are refused."""

from __future__ import annotations

import errno
import os
import stat
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from fomal.data.images.image_kinds import HEAD
from fomal.data.images.source_base import LARGEST_RATIO, Source, members_by_name, wrong_path
from fomal.utils.files import LARGEST

_SMALL = 2**20  # bytes; a member no larger than this is no bomb, whatever its ratio: drawings do compress
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # of others zipfile inflates without a bound


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
        self._members, self.folders = members_by_name(self.label, "zip", self._checked(members))
        self.names = sorted(self._members)

    def _checked(self, members: Iterable[zipfile.ZipInfo]) -> Iterator[tuple[str, bool, zipfile.ZipInfo]]:
        for member in members:
            refuse_member(member, self.label)
            yield member.filename.rstrip("/"), member.is_dir(), member

    def _zip(self) -> zipfile.ZipFile:
        """The open zip; each process has its own, since a forked file shares its position."""
        if self._open is None or self._open[0] != os.getpid():
            self._open = os.getpid(), zipfile.ZipFile(self.path)
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


def refuse_member(member: zipfile.ZipInfo, label: str) -> None:
    """Raise ValueError for a member that no honest zip of images has."""
    name = member.orig_filename
    wrong = wrong_path(name, "zip")
    if member.filename != name:  # it is from the field "Unicode path", or cut at a zero
        wrong = wrong or wrong_path(member.filename, "zip")
    if wrong:
        pass
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
