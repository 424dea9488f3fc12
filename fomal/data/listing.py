"""Which image file belongs to which class, and to which split where the source says so."""

from __future__ import annotations

import csv
import io
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from fomal.data.sampler import SPLITS
from fomal.data.source import Source


class Listed(NamedTuple):
    """An image file.

    Attributes:
        name: of the file in its source.
        label: its class.
        split: "train", "val" or "test"; empty where the source does not say.
    """

    name: str
    label: str
    split: str = ""


class Listing(NamedTuple):
    """What a source has.

    Attributes:
        files: sorted by label and name.
        empty: folders of classes without an image.
    """

    files: list[Listed]
    empty: list[str]


def by_folders(source: Source) -> Listing:
    """The class of a file is its folder, below the folders train/, val/ and test/ where the source has those.

    Folders that hold nothing but one other folder are passed over.

    Raises:
        ValueError: there are no class folders, or one class lies within another, or two have one name.
    """
    images = source.images
    outside = [name for name in images if "/" not in name]
    if not images or outside:
        found = f"images outside any folder, e.g. {outside[0]!r}" if outside else "no images"
        raise ValueError(
            f"{source.label} has {found}: put the images of each class into a folder of its name, "
            f"or name their classes in a CSV file, data.labels."
        )
    top = _common_top(source)
    within = {name: PurePosixPath(name).relative_to(top) for name in images}
    splits = {path.parts[0] for path in within.values() if len(path.parts) > 2} & set(SPLITS)
    files = []
    for name, path in within.items():
        folder = path.parent.parts
        split = folder[0] if splits and folder[0] in SPLITS else ""
        label = "/".join(folder[1:] if split else folder)
        if splits and (not split or not label):
            raise ValueError(
                f"{source.label} has folders {', '.join(sorted(splits))}, but also {name!r}: "
                f"every image must lie in a class folder of one of them."
            )
        files.append(Listed(name, label, split))
    _refuse_nested({file.label for file in files}, source)
    return _listing(files, _empty_folders(source), source)


def _common_top(source: Source) -> PurePosixPath:
    """The deepest folder that all images share, as far as it is no class and no split."""
    top = PurePosixPath()
    paths = [PurePosixPath(name).parts for name in source.images]
    while True:
        depth = len(top.parts)
        first = {parts[depth] for parts in paths}
        if len(first) > 1 or min(map(len, paths)) < depth + 3 or first & set(SPLITS):
            return top
        top /= first.pop()


def _refuse_nested(labels: set[str], source: Source) -> None:
    for label in sorted(labels):
        for parent in PurePosixPath(label).parents:
            if str(parent) in labels:
                raise ValueError(
                    f"{source.label} has images in {str(parent)!r} and in {label!r} within it: "
                    f"move them, so that each class is one folder."
                )


def _empty_folders(source: Source) -> list[str]:
    """Folders without any file, and those beside classes that hold none of a known suffix."""
    holding, classes = _folders_of(source.names), _folders_of(source.images)
    beside = {name.rpartition("/")[0].rpartition("/")[0] for name in source.images}
    return [
        folder
        for folder in source.folders
        if folder not in holding or (folder not in classes and folder.rpartition("/")[0] in beside)
    ]


def _folders_of(names: Iterable[str]) -> set[str]:
    """The folders that the files lie in, however deep."""
    nearest = {name.rpartition("/")[0] for name in names}
    return nearest | {str(parent) for folder in nearest for parent in PurePosixPath(folder).parents}


def by_csv(source: Source, labels: str) -> Listing:
    """Classes from a CSV file with the columns filename, label and, if wanted, split.

    Args:
        source: the images; file names are relative to its root or to its folder images/.
        labels: path of the CSV file, absolute or relative to a source that is a folder.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it lacks a column or has a row that cannot be used.
    """
    path = Path(labels).expanduser()
    if not path.is_file() and (below := Path(source.where).expanduser() / path).is_file():
        path = below
    if not path.is_file():
        raise FileNotFoundError(f"labels={labels!r} is neither a file nor one in {source.label}.")
    return read_csv(source, path.read_bytes(), str(path))


def read_csv(source: Source, content: bytes, where: str, split: str = "", below: str = "") -> Listing:
    """As `by_csv`, from the file's content.

    Args:
        source: the images.
        content: of the CSV file.
        where: what to call it in messages.
        split: of all rows, where the file has no column for it.
        below: folder of the source that has the file; names are relative to it, to the one that it lies in, or to a
            folder images/ in either.
    """
    try:
        reader = csv.DictReader(io.StringIO(content.decode("utf-8-sig"), newline=""))
        rows = [(reader.line_num, row) for row in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"labels={where!r} is not a CSV file in UTF-8: {error}") from error
    lacking = [column for column in ("filename", "label") if column not in (reader.fieldnames or ())]
    if lacking:
        raise ValueError(f"labels={where!r} has no {' and no '.join(lacking)}: give it the columns filename,label.")
    top = _csv_top(source, [row["filename"] or "" for _, row in rows], below)
    files = []
    for number, row in rows:
        name, label, part = row["filename"], row["label"], row.get("split") or split
        if not name or not label or not label.strip() or None in row:
            raise ValueError(f"labels={where!r}, line {number}: it needs a filename and a label.")
        if part and part not in SPLITS:
            raise ValueError(f"labels={where!r}, line {number}: split {part!r} is none of {', '.join(SPLITS)}.")
        files.append(Listed(top + name, label.strip(), part))
    if len({bool(file.split) for file in files}) > 1:
        raise ValueError(f"labels={where!r} gives some rows a split and others none: fill the column, or leave it out.")
    return _listing(_known(files, source, where), [], source)


def _csv_top(source: Source, names: list[str], below: str) -> str:
    """The folder that the file names are relative to: that which has most of them."""
    there, folder = set(source.names), PurePosixPath(below)
    folders = (folder, folder / "images", folder.parent, folder.parent / "images")
    tops = ["" if top == PurePosixPath() else f"{top}/" for top in folders]
    return max(tops, key=lambda top: sum(top + name in there for name in names))


def _known(files: list[Listed], source: Source, where: str) -> list[Listed]:
    """The files, if they all exist and each is named once."""
    there, seen = set(source.names), dict[str, Listed]()
    for file in files:
        before = seen.setdefault(file.name, file)
        if before is not file:
            raise ValueError(
                f"labels={where!r} names {file.name!r} twice, as {before.label!r} and as {file.label!r}: keep one row."
            )
    missing = [file.name for file in files if file.name not in there]
    if missing:
        raise ValueError(f"labels={where!r} names files that {source.label} lacks: {enumerated(missing)}.")
    return files


def _listing(files: list[Listed], empty: list[str], source: Source) -> Listing:
    """Sorted, and class names in one normal form; classes that differ in nothing else are refused."""
    spellings: dict[str, str] = {}
    for i, file in enumerate(files):
        label = normal(file.label)
        before = spellings.setdefault(label, file.label)
        if before != file.label:
            raise ValueError(
                f"{source.label} has two classes with one name, {label!r}, which differ in how its letters are "
                f"encoded ({before!a} and {file.label!a}): put their images into one."
            )
        files[i] = file._replace(label=label)
    return sorted_listing(files, empty)


def sorted_listing(files: Iterable[Listed], empty: Sequence[str] = ()) -> Listing:
    """The files in the order that `Listing` has them."""
    return Listing(sorted(files, key=lambda file: (file.label, file.name)), list(empty))


def normal(name: str) -> str:
    """A class's name in Unicode's composed form: file systems differ in that they keep."""
    return unicodedata.normalize("NFC", name)


def enumerated(names: Iterable[str], shown: int = 5) -> str:
    """The first names, and how many more there are."""
    listed = list(names)
    more = f" and {len(listed) - shown} more" if len(listed) > shown else ""
    return ", ".join(map(repr, listed[:shown])) + more
