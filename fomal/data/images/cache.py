"""A cache file of arrays: written whole or not at all, and checked before it is believed."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import stat
import uuid
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from fomal.utils.files import UnreadableFile, open_regular
from fomal.utils.output import rank_zero_warn

try:
    import grp
    import pwd
except ImportError:  # no POSIX system
    grp = pwd = None  # type: ignore[assignment]

Arrays = dict[str, NDArray[Any]]

_MAGIC = b"fomal arrays 2\n"
_DIGEST = hashlib.sha256().digest_size


class UnsafeCache(OSError):
    """A cache that others can write to, so that what is in it is not believed; `strerror` says why."""

    def __init__(self, path: Path, why: str) -> None:
        super().__init__(errno.EPERM, why, str(path))


def cache_folder(cache_dir: str | None) -> Path:
    """The folder for cache files: `cache_dir`, or else `$XDG_CACHE_HOME/fomal`, or else `~/.cache/fomal`.

    Raises:
        RuntimeError: there is no home directory, and neither of the others was given.
    """
    if cache_dir is not None:
        return Path(cache_dir).expanduser()
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "fomal"
    try:
        return Path.home() / ".cache" / "fomal"
    except RuntimeError as error:  # e.g. a container run as a user without an account
        raise RuntimeError(
            "cache_dir=None needs a home directory, and there is none: set data.cache_dir to a folder."
        ) from error


def make_folder(folder: Path) -> None:
    """Make a cache folder, where it is missing, and see that nobody else can write to it.

    Raises:
        UnsafeCache: somebody can, or it is reached by a link of somebody else.
        OSError: it cannot be made.
    """
    for part in (*reversed(folder.absolute().parents), folder.absolute()):
        with suppress(FileExistsError):
            if not part.exists():
                part.mkdir(0o755)
        if part.is_symlink() and _foreign(part.lstat()):
            raise UnsafeCache(part, f"{part} is a link that belongs to another user")
    about = folder.stat()
    if not stat.S_ISDIR(about.st_mode):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
    if why := _open_to_others(about):
        raise UnsafeCache(folder, f"the folder {why}")


def unusable(folder: Path, error: OSError, instead: str) -> str:
    """The warning that the cache in `folder` is not used because of `error`.

    Args:
        folder: of the cache.
        error: raised by `make_folder`, or in writing.
        instead: what is done.
    """
    what = "is not used" if isinstance(error, UnsafeCache) else "cannot be written"
    reason = error.strerror or getattr(error.__cause__, "strerror", None) or error  # the cause: of write_arrays
    return (
        f"cache_dir={str(folder)!r} {what} ({reason}): {instead}; set data.cache_dir to a folder of your own that has "
        f"room."
    )


def open_own(path: Path) -> BinaryIO:
    """Open a file of the cache, which only this user or the system's administrator can have written.

    Raises:
        UnsafeCache: others can write it, or it is a link.
        OSError: it does not exist, or cannot be read.
    """
    try:
        file = open_regular(path, follow=False)
    except UnreadableFile as error:
        raise UnsafeCache(path, str(error.strerror)) from None
    if why := _open_to_others(os.fstat(file.fileno())):
        file.close()
        raise UnsafeCache(path, f"it {why}")
    return file


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file that takes the place of `path` at the end, or vanishes if there is an error.

    Its name is not to be foreseen, and it is no file that exists already or that a link leads to.
    """
    # Not tempfile: its files are private to the user, which a cache read by a group must not be.
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    try:
        with os.fdopen(os.open(unfinished, flags, 0o644), "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def remove_unfinished(path: Path) -> None:
    """Remove what killed writers of `path` have left; for one who knows that nobody is writing it."""
    for left in path.parent.glob(f".{path.name}.*.tmp"):
        left.unlink(missing_ok=True)


def read_arrays(path: Path) -> Arrays | None:
    """Read a file of `write_arrays`.

    Returns:
        The arrays; None where there is no such file, or, with a warning, where it is damaged, was written under
        another name, or can be written by others.

    Raises:
        OSError: there is one that cannot be read.
    """
    try:
        with open_own(path) as file:
            content = file.read()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except UnsafeCache as error:
        rank_zero_warn(f"The cache file {path} is not believed ({error.strerror}): building it again.")
        return None
    except OSError as error:
        raise OSError(
            f"cache_dir={str(path.parent)!r}: {path.name} cannot be read ({error.strerror}): "
            f"delete it, or set data.cache_dir to another folder."
        ) from error
    try:
        return _parse(content, path.name)
    except (ValueError, KeyError, zipfile.BadZipFile) as error:
        rank_zero_warn(f"The cache file {path} is damaged ({error}): building it again.")
        return None


def _parse(content: bytes, name: str) -> Arrays:
    """The checksum goes first, so that nothing of a damaged file is parsed."""
    head = len(_MAGIC) + _DIGEST
    payload = memoryview(content)[head:]
    if content[:head] != _MAGIC + hashlib.sha256(payload).digest():
        raise ValueError("its checksum is wrong")
    with np.load(io.BytesIO(payload), allow_pickle=False) as arrays:
        found = dict(arrays)
    if (written := str(found.pop("written_as"))) != name:
        raise ValueError(f"it was written as {written}")
    return found


def write_arrays(path: Path, arrays: Mapping[str, Any]) -> None:
    """Write numpy `arrays` to `path`, atomically: readers and other writers see a whole file or none.

    Raises:
        OSError: the folder cannot be written.
    """
    buffer = io.BytesIO()
    np.savez(buffer, written_as=np.array(path.name), **arrays)
    payload = buffer.getbuffer()
    try:
        make_folder(path.parent)
        with replacing(path) as file:
            file.write(_MAGIC + hashlib.sha256(payload).digest())
            file.write(payload)
    except UnsafeCache:
        raise
    except OSError as error:
        raise OSError(
            f"cache_dir={str(path.parent)!r} cannot be written ({error.strerror}): "
            f"set data.cache_dir to a folder that can."
        ) from error


def _foreign(about: os.stat_result) -> bool:
    """Tell whether a file belongs to neither this user nor the system's administrator."""
    return hasattr(os, "geteuid") and about.st_uid not in (os.geteuid(), 0)


def _open_to_others(about: os.stat_result) -> str:
    """Why others can write to a file or a folder; empty where they cannot.

    A sticky folder, like /tmp, is open as well: anybody may put files of any name there.
    """
    if not hasattr(os, "geteuid"):
        return ""
    if _foreign(about):
        return f"belongs to another user ({about.st_uid})"
    if about.st_mode & stat.S_IWOTH:
        return "can be written by all users"
    if about.st_mode & stat.S_IWGRP and not _private_group(about.st_gid):
        return f"can be written by its group ({about.st_gid})"
    return ""


def _private_group(group: int) -> bool:
    """Tell whether a group is the one of this user alone, as many systems make it, with group-writable files."""
    try:
        name, about = pwd.getpwuid(os.geteuid()).pw_name, grp.getgrgid(group)
    except KeyError:
        return False
    return about.gr_name == name and set(about.gr_mem) <= {name}
