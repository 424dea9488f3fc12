"""Read and write files: regular files alone are read; files are written whole or not at all, and earlier ones kept."""

from __future__ import annotations

import csv
import errno
import os
import secrets
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from fomal.utils.output import quoted, rank_zero_warn

LARGEST = 2**29
"""Bytes that a file which is read whole may have, unless its reader says otherwise."""

LARGEST_WEIGHTS = 2**36
"""Bytes of a checkpoint, or of an adapted model's weights or support set."""

_SHOWN = 60  # characters of a path that is too long
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


def check_path(name: str, path: str | Path) -> None:
    """Raise ValueError, naming the argument, where no file can be called `path`."""
    text = str(path)
    if not text or "\0" in text:
        raise ValueError(f"{name}={text!r} must be a path, without a zero byte in it.")
    try:
        os.stat(text)
    except OSError as error:
        if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            cut = text if len(text) < _SHOWN else f"{text[:_SHOWN]}..."
            raise ValueError(f"{name}={cut!r} cannot be a file ({error.strerror}): give another path.") from error


def check_writable(name: str, path: Path, folder: bool = False) -> None:
    """Look whether a file, or a new folder, could be written at `path`, and write nothing.

    Raises:
        ValueError: no file can have that name.
        WriteError: something is in the way, or the folder it would be in may not be written to; names the argument.
    """
    check_path(name, path)
    if not folder and path.exists() and not path.is_file():
        raise WriteError(f"{name}={path} is a folder, a device or a pipe: give the name of a file.")
    above = next(part for part in path.absolute().parents if part.exists())
    if not above.is_dir():
        raise WriteError(f"{name}={path} cannot be written, since {above} is no folder: give another path.")
    if not os.access(above, os.W_OK | os.X_OK):
        raise WriteError(f"{name}={path} cannot be written: make {above} writable, or give another path.")


def refuse_overwriting(name: str, path: Path, read: Iterable[str | Path]) -> None:
    """Raise WriteError, naming the argument, where the file to be written is one of those that are read."""
    if path.exists() and any(os.path.exists(other) and os.path.samefile(path, other) for other in read):
        raise WriteError(f"{name}={path} is one of the files that are read: give another path.")


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
        size = _size(file, path, largest)
        content = file.read(size or 1)
    if len(content) > size:
        raise UnreadableFile(errno.EINVAL, "it says that it is empty, and is not", str(path))
    return content


def refuse_unreadable(path: str | Path, largest: int = LARGEST_WEIGHTS) -> None:
    """Refuse a file that others read, unless it is a regular one of at most `largest` bytes.

    Raises:
        UnreadableFile: it is not.
        OSError: it does not exist, is a folder, or may not be read.
    """
    with open_regular(path) as file:
        _size(file, path, largest)


def _size(file: BinaryIO, path: str | Path, largest: int) -> int:
    size = os.fstat(file.fileno()).st_size
    if size > largest:
        raise UnreadableFile(errno.EFBIG, f"it has {size} bytes, more than the {largest} allowed", str(path))
    return size


def _refuse_irregular(path: str | Path, about: os.stat_result) -> None:
    if stat.S_ISDIR(about.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(about.st_mode):
        kind = _KINDS.get(stat.S_IFMT(about.st_mode), "something else")
        raise UnreadableFile(errno.EINVAL, f"it is {kind}, and no regular file", str(path))


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_CLOSED = (errno.EROFS, errno.EACCES, errno.EPERM)


class WriteError(OSError):
    """A file that could not be written; the text names it and the remedy."""


def keep_earlier(path: Path) -> Path | None:
    """Rename an existing file `name.ext` to the first free `name_1.ext`, `name_2.ext`, ...

    Returns:
        The new path; None where there was no file.

    Raises:
        WriteError: it cannot be renamed.
    """
    if not path.exists():
        return None
    number = 1
    while (kept := path.with_name(f"{path.stem}_{number}{path.suffix}")).exists():
        number += 1
    with naming(path):
        path.rename(kept)
    return kept


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Name `path` and a remedy where writing it fails; errors about other files pass.

    Raises:
        WriteError: in the place of an OSError.
    """
    try:
        yield
    except OSError as error:
        named = None if error.filename is None else Path(os.fsdecode(error.filename))
        if (
            isinstance(error, WriteError | UnreadableFile)
            or error.errno is None
            or (named and not _concerns(named, path))
        ):
            raise
        raise WriteError(unwritten(path, error)) from error


def _concerns(named: Path, path: Path) -> bool:
    return named.parent == path.parent or named in path.parents or path in named.parents


def is_full(error: OSError) -> bool:
    """Tell whether a disk was full or read-only, and the error does not name the remedy yet."""
    return not isinstance(error, WriteError | UnreadableFile) and error.errno in (*_FULL, errno.EROFS)


def unwritten(path: str | Path | None, error: OSError) -> str:
    """Say that a file, or one that is not known, could not be written, why, and what to do."""
    reason = error.strerror or str(error)
    if path is None:
        return f"a file could not be written ({reason}): make room for the run, data.cache_dir and $TMPDIR."
    path = Path(path)
    if error.errno in _FULL:
        remedy = f"make room on the disk of {path.parent}, or choose another folder"
    elif error.errno in _CLOSED:
        remedy = f"make {path.parent} writable, or choose another folder"
    elif error.errno in (errno.ENOTDIR, errno.EEXIST, errno.EISDIR):
        remedy = "a file or folder of that name is in the way: remove it, or choose another name"
    else:
        remedy = "choose another folder, or see to its disk"
    return f"{path} could not be written ({reason}): {remedy}."


@contextmanager
def atomic_replace(path: Path, keep: bool = False) -> Iterator[Path]:
    """Give a new file beside `path` to write to, and let it take the place of `path` when all is written.

    Its name cannot be guessed, and it is made anew, so that no link is followed. Folders are made. After an error,
    Ctrl-C included, `path` is as it was, and the new file is gone.

    Args:
        path: where the file belongs.
        keep: rename a file that is there rather than replace it; see `keep_earlier`.

    Raises:
        WriteError: the disk is full or read-only, or `path` is a device or a folder.
    """
    with naming(path):
        if path.exists() and not path.is_file():
            raise OSError(errno.EEXIST, "it is a folder, a device or a pipe")
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f".{secrets.token_hex(8)}.unfinished")
        try:
            unfinished.open("xb").close()
            yield unfinished
            with unfinished.open("rb") as file:
                os.fsync(file.fileno())  # some file systems tell only now that they are full
            if keep:
                keep_earlier(path)
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)


def write_text(path: Path, text: str, keep: bool = False) -> None:
    """Write a text file in UTF-8, as `atomic_replace` does."""
    with atomic_replace(path, keep) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, object]], keep: bool = False) -> None:
    """Write a table as `atomic_replace` does, with texts that a spreadsheet would run behind an apostrophe."""
    with atomic_replace(path, keep) as unfinished, unfinished.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(map(quoted, columns))
        writer.writerows([quoted(row.get(column, "")) for column in columns] for row in rows)


@contextmanager
def dispensable(what: str) -> Iterator[None]:
    """Warn, and go on, where `what` fails, which a run can do without."""
    try:
        yield
    except Exception as error:  # figures meet many kinds, and the run they are of is safe
        kind = "" if isinstance(error, OSError) else f"{type(error).__name__}: "
        rank_zero_warn(f"The run goes on without {what}: {kind}{' '.join(str(error).split())}")
