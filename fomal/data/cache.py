"""A cache file of arrays: written whole or not at all, and checked before it is believed."""

from __future__ import annotations

import hashlib
import io
import os
import uuid
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn
from numpy.typing import NDArray

Arrays = dict[str, NDArray[Any]]

_MAGIC = b"fomal arrays 1\n"
_DIGEST = hashlib.sha256().digest_size


def cache_folder(cache_dir: str | None) -> Path:
    """The folder for cache files: `cache_dir`, or else `$XDG_CACHE_HOME/fomal`, or else `~/.cache/fomal`."""
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


def read_arrays(path: Path) -> Arrays | None:
    """Read a file of `write_arrays`.

    Returns:
        The arrays; None where there is no such file, or, with a warning, where it is damaged.
    """
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise OSError(
            f"cache_dir={str(path.parent)!r}: {path.name} cannot be read ({error.strerror}): "
            f"delete it, or set data.cache_dir to another folder."
        ) from error
    try:
        return _parse(content)
    except (ValueError, zipfile.BadZipFile) as error:
        rank_zero_warn(f"The cache file {path} is damaged ({error}): building it again.")
        return None


def _parse(content: bytes) -> Arrays:
    """The checksum goes first, so that nothing of a damaged file is parsed."""
    head = len(_MAGIC) + _DIGEST
    payload = content[head:]
    if content[:head] != _MAGIC + hashlib.sha256(payload).digest():
        raise ValueError("its checksum is wrong")
    with np.load(io.BytesIO(payload), allow_pickle=False) as arrays:
        return dict(arrays)


def write_arrays(path: Path, arrays: Mapping[str, Any]) -> None:
    """Write numpy `arrays` to `path`, atomically: readers and other writers see a whole file or none.

    Raises:
        OSError: the folder cannot be written.
    """
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    payload = buffer.getbuffer()
    # Not tempfile: its files are private to the user, which a cache shared by a group must not be.
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with unfinished.open("xb") as file:
                file.write(_MAGIC + hashlib.sha256(payload).digest())
                file.write(payload)
            os.replace(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)
    except OSError as error:
        raise OSError(
            f"cache_dir={str(path.parent)!r} cannot be written ({error.strerror}): "
            f"set data.cache_dir to a folder that can."
        ) from error
