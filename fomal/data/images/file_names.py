"""The file that a cell of a table means: people write paths in many ways."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import PurePosixPath

from fomal.data.images.listing import normal
from fomal.data.images.source import FolderSource, Source

Reading = Callable[[str], str]
"""From a cell to the name of a file in the source, whether there is one or not."""


class FileNames:
    """The names of a source's files, to be found by how a table writes them.

    A cell may be written with backslashes, with ./, in other letters of either case, or, for an image, without its
    ending, as far as one file alone is meant. Absolute paths, and those relative to the table or to the current folder,
    mean files below the source's root. Nothing else is ever found.

    Args:
        source: the files.
        below: folder of the source that has the table; cells are relative to it, to the one that it lies in, to a
            folder images/ in either, or to the folder that all files lie in: to that with which most are found.
        folder: absolute folder of a table that lies elsewhere.
    """

    def __init__(self, source: Source, below: str = "", folder: str = "") -> None:
        self.there = set(source.names)
        self._alike: dict[str, list[str]] = {}
        for name in source.names:
            self._alike.setdefault(_alike(name), []).append(name)
        self._bare: dict[str, list[str]] = {}
        for name in source.images:
            self._bare.setdefault(_alike(str(PurePosixPath(name).with_suffix(""))), []).append(name)
        self._readings = _readings(source, below, folder)

    def find(self, cells: Sequence[str]) -> list[list[str]]:
        """The files that each cell may mean, one if it is clear."""
        found = [[self._named(reading(cell)) for cell in cells] for reading in self._readings]
        return max(found, key=lambda names: sum(map(bool, names)))

    def _named(self, name: str) -> list[str]:
        if name in self.there:
            return [name]
        tidy = str(PurePosixPath(name.replace("\\", "/")))
        if tidy in self.there:
            return [tidy]
        alike = self._alike.get(_alike(tidy), [])
        same = [other for other in alike if normal(other) == normal(tidy)]
        return same or alike or self._bare.get(_alike(tidy), [])


def _alike(name: str) -> str:
    return normal(name).casefold()


def _readings(source: Source, below: str, folder: str) -> list[Reading]:
    here = PurePosixPath(below)
    tops = (here, here / "images", here.parent, here.parent / "images", PurePosixPath(_shared_folder(source.names)))
    prefixes = ["" if str(top) == "." else f"{top}/" for top in dict.fromkeys(tops)]
    readings = [_after(prefix) for prefix in prefixes]
    if isinstance(source, FolderSource):
        roots = dict.fromkeys((os.path.abspath(source.root), os.path.realpath(source.root)))
        readings += [_below(roots, start) for start in dict.fromkeys(filter(None, (folder, os.getcwd())))]
        readings.append(_without(os.path.basename(os.path.abspath(source.root))))
    return readings


def _shared_folder(names: Sequence[str]) -> str:
    """The folder that all files lie in; "." where there is none."""
    try:
        return os.path.commonpath([os.path.dirname(name) for name in names])
    except ValueError:  # of no files, or of absolute and relative paths
        return "."


def _after(prefix: str) -> Reading:
    return lambda cell: prefix + cell.removeprefix("./") if prefix else cell


def _without(top: str) -> Reading:
    """For cells that begin with the root's own name."""
    return lambda cell: cell.replace("\\", "/").removeprefix("./").removeprefix(f"{top}/")


def _below(roots: Iterable[str], start: str) -> Reading:
    """For absolute paths, and those relative to the folder `start`."""

    def read(cell: str) -> str:
        path = os.path.normpath(os.path.join(start, cell.replace("\\", "/")))
        return next((os.path.relpath(path, root) for root in roots if path.startswith(f"{root}/")), cell)

    return read
