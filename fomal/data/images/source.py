"""The image files of a folder or an archive."""

from __future__ import annotations

from pathlib import Path

from fomal.data.images.npz_source import NpzSource
from fomal.data.images.source_base import (
    LARGEST_RATIO,
    ArraySource,
    Content,
    FileSource,
    FolderSource,
    JoinedSource,
    Source,
)
from fomal.data.images.tar_source import TarSource, is_tar
from fomal.data.images.zip_source import ZipSource
from fomal.utils.files import check_path

__all__ = [
    "LARGEST_RATIO",
    "ArraySource",
    "Content",
    "FileSource",
    "FolderSource",
    "JoinedSource",
    "NpzSource",
    "Source",
    "TarSource",
    "ZipSource",
    "is_archive",
    "open_source",
]


def open_source(root: str, setting: str = "root", cache_gb: float = 4.0) -> Source:
    """The files of a folder, a zip, a tar or an npz.

    Args:
        root: its path.
        setting: the argument that it was given as.
        cache_gb: how many 10**9 bytes a compressed tar, or the images of an npz, may have when they are inflated.

    Raises:
        FileNotFoundError: there is none.
        ValueError: the archive is damaged, hostile or too large.
    """
    check_path(setting, root)
    path = Path(root).expanduser()
    if path.is_dir():
        return FolderSource(path, setting)
    if not path.is_file():
        what = "is neither a folder nor a regular file" if path.exists() else "does not exist"
        raise FileNotFoundError(f"{setting}={root!r} {what}: give a folder or a zip, tar or npz with the images.")
    if path.suffix.lower() == ".npz":
        return NpzSource(path, setting, cache_gb)
    return TarSource(path, setting, cache_gb) if is_tar(path) else ZipSource(path, setting)


def is_archive(path: Path) -> bool:
    """Tell an archive that `open_source` reads from other files, by its suffix or by how it begins."""
    return path.is_file() and (path.suffix.lower() in (".zip", ".npz") or is_tar(path))
