"""Read and write files: nothing but regular files is read, and earlier ones are not lost."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

LARGEST = 2**29
"""Bytes that a file which is read whole may have, unless its reader says otherwise."""

_KINDS = {
    stat.S_IFIFO: "a fifo",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
    stat.S_IFLNK: "a link",
}


class UnreadableFile(OSError):
    """A file that is not read because of what it is; its text is one line that names it."""

    def __str__(self) -> str:
        return f"{self.filename} is not read: {self.strerror}"


def open_regular(path: str | Path, follow: bool = True) -> BinaryIO:
    """Open a regular file for reading; a fifo, a device or a socket is neither waited for nor touched.

    Args:
        path: the file.
        follow: whether it may be a link.

    Raises:
        UnreadableFile: it is no regular file.
        OSError: it does not exist, is a folder, or may not be read.
    """
    _refuse_irregular(path, os.stat(path, follow_symlinks=follow))
    flags = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0)
    file = os.open(path, flags | (0 if follow else getattr(os, "O_NOFOLLOW", 0)))
    try:
        _refuse_irregular(path, os.fstat(file))  # it may have been replaced meanwhile
        return os.fdopen(file, "rb")
    except BaseException:
        os.close(file)
        raise


def read_regular(path: str | Path, largest: int = LARGEST, follow: bool = True) -> bytes:
    """Read a regular file whole.

    Args:
        path: the file.
        largest: bytes that it may have.
        follow: whether it may be a link.

    Raises:
        UnreadableFile: it is no regular file, is larger than `largest`, or says that it is empty and is not, as the
            kernel's own files do, some of which never end.
        OSError: it does not exist, is a folder, or may not be read.
    """
    with open_regular(path, follow) as file:
        size = os.fstat(file.fileno()).st_size
        if size > largest:
            raise UnreadableFile(errno.EFBIG, f"it has {size} bytes, more than the {largest} allowed", str(path))
        content = file.read(size or 1)
    if len(content) > size:
        raise UnreadableFile(errno.EINVAL, "it says that it is empty, and is not", str(path))
    return content


def _refuse_irregular(path: str | Path, about: os.stat_result) -> None:
    if stat.S_ISDIR(about.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(about.st_mode):
        kind = _KINDS.get(stat.S_IFMT(about.st_mode), "something else")
        raise UnreadableFile(errno.EINVAL, f"it is {kind}, and no regular file", str(path))


def keep_earlier(path: Path) -> Path | None:
    """Rename an existing file `name.ext` to the first free `name_1.ext`, `name_2.ext`, ...

    Returns:
        The new path; None where there was no file.
    """
    if not path.exists():
        return None
    number = 1
    while (kept := path.with_name(f"{path.stem}_{number}{path.suffix}")).exists():
        number += 1
    path.rename(kept)
    return kept
