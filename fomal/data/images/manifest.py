"""Reading which image file belongs to which class and split, by tables such as CSV files."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from fomal.data.images.columns import AUTOMATIC, TableSettings
from fomal.data.images.file_names import FileNames
from fomal.data.images.listing import Listed, Listing, by_folders, listed, normal, split_named, split_within
from fomal.data.images.selection import EVERY, Selection
from fomal.data.images.source import FileSource, Source
from fomal.data.images.table import read_table
from fomal.tasks.sampler import SPLITS
from fomal.utils.files import check_path, read_regular
from fomal.utils.output import rank_zero_info, rank_zero_warn, unquoted

LARGEST_TABLE = 2**28
"""Bytes that a table may have."""
_LONGEST = 120  # letters of a row in a message
METADATA = ("metadata.csv", "metadata.jsonl")
"""The tables that Hugging Face keeps beside images, whose column file_name is relative to their folder."""

LabelsGiven = Mapping[str, str] | Sequence[str] | str
"""A table's path; or one for each split: by split, or in a list, where the files' names say which."""


class Manifest(NamedTuple):
    """A table's content.

    Attributes:
        content: its bytes.
        where: what to call it in messages.
        split: of all rows, where the table has no column for it.
        below: folder of the source that has it.
        folder: that it lies in, absolute; empty for one in an archive.
    """

    content: bytes
    where: str
    split: str = ""
    below: str = ""
    folder: str = ""


class _Row(NamedTuple):
    """What a row says, and where it stands."""

    place: str
    file: str
    label: str
    split: str


Problems = dict[str, list[str]]
"""What is wrong with rows: for each kind of fault the rows, or the files that they name."""


def list_images(
    source: Source,
    labels: LabelsGiven | None = None,
    settings: TableSettings = AUTOMATIC,
    selection: Selection = EVERY,
    on_error: str = "raise",
) -> Listing:
    """Classes from tables, if `labels` names some or Hugging Face's lie beside the images, else from folders.

    Args: see `by_labels`.
    """
    if labels is not None:
        return by_labels(source, labels, settings, selection, on_error)
    manifests = metadata(source, settings)
    if not manifests:
        return by_folders(source, selection)
    more = f" and {len(manifests) - 1} more" if len(manifests) > 1 else ""
    rank_zero_info(f"{source.label}: classes are those of {manifests[0].where}{more}, and not the folders.")
    return read_manifests(source, manifests, settings, selection, on_error)


def by_labels(
    source: Source,
    labels: LabelsGiven,
    settings: TableSettings = AUTOMATIC,
    selection: Selection = EVERY,
    on_error: str = "raise",
) -> Listing:
    """Classes from one or several tables: CSV, JSON lines or JSON.

    Args:
        source: the images.
        labels: path of the table, or of several; absolute, or relative to the current folder or to the source's root.
        settings: how they are written.
        selection: which of the files that they name are meant.
        on_error: about rows that cannot be used: "raise" names them, "skip" warns and leaves them out.

    Raises:
        FileNotFoundError: there is no such table.
        ValueError: it cannot be used, or with "raise" some of its rows.
    """
    if isinstance(labels, str):
        given = [(labels, "")]
    elif isinstance(labels, Mapping):
        given = [(path, _known_split(key)) for key, path in labels.items()]
    else:
        given = [(path, split_within(PurePosixPath(path.replace("\\", "/")).stem)) for path in labels]
    if not given:
        raise ValueError("labels names no table: give the path of a CSV file, or leave it out.")
    return read_manifests(
        source, [_opened(source, path, split) for path, split in given], settings, selection, on_error
    )


def _known_split(name: str) -> str:
    split = split_named(name)
    if not split:
        raise ValueError(f"labels: {name!r} is none of {', '.join(SPLITS)}: give a path for each of them.")
    return split


def _opened(source: Source, given: str, split: str) -> Manifest:
    check_path("labels", given)
    path, where = Path(given).expanduser(), f"labels={given!r}"
    inside = PurePosixPath(given).as_posix()
    if not path.exists() and inside in source.names:
        content = source.read(inside)
        if not isinstance(content, bytes):
            raise ValueError(f"{where} is an image in {source.label}: give a CSV file.")
        return Manifest(content, where, split, inside.rpartition("/")[0])
    if not path.exists():
        raise FileNotFoundError(f"{where} is neither a file nor one in {source.label}.")
    try:
        content = read_regular(path, LARGEST_TABLE)
    except OSError as error:
        raise ValueError(f"{where} cannot be read: {error.strerror or error}; give a CSV file.") from error
    return Manifest(content, where, split, folder=os.path.abspath(path.parent))


def read_manifests(
    source: Source,
    manifests: Sequence[Manifest],
    settings: TableSettings = AUTOMATIC,
    selection: Selection = EVERY,
    on_error: str = "raise",
) -> Listing:
    """Do as `by_labels`, from the tables' content.

    Raises:
        ValueError: no row can be used, or some that cannot are not to be skipped; only some rows have a split.
    """
    problems: Problems = {}
    rows = [row for manifest in manifests for row in _rows(source, manifest, settings, problems)]
    where = manifests[0].where if len(manifests) == 1 else f"{manifests[0].where} and {len(manifests) - 1} more"
    files = _each_once(rows, problems)
    _report(where, problems, on_error)
    if not files:
        raise ValueError(f"{where} has no row that can be used.")
    if len({bool(file.split) for file in files}) > 1:
        raise ValueError(f"{where} gives some rows a split and others none: fill the column, or leave it out.")
    seen = dict.fromkeys(file.name for file in files)
    meant, left_out = selection.split(source, seen | dict.fromkeys(source.images))
    left_out |= {name: "that the table does not name" for name in meant if name not in seen}
    files = [file for file in files if file.name not in left_out]
    if not files:
        raise ValueError(f"{where} names no image that include and exclude leave: mend the patterns.")
    return listed(files, source, [], left_out)


def metadata(source: Source, settings: TableSettings = AUTOMATIC) -> list[Manifest]:
    """The tables that Hugging Face keeps beside images, as far as they have columns of files and classes.

    The split of a table is that which its folder names.

    Raises:
        ValueError: one is no table.
    """
    found: dict[str, Manifest] = {}
    for name in sorted(source.names):  # .csv before .jsonl
        folder, _, file = name.rpartition("/")
        if file not in METADATA or folder in found or isinstance(source, FileSource):
            continue
        content = source.read(name)
        if not isinstance(content, bytes):
            continue
        where = repr(f"{source.where}/{name}")
        columns = read_table(content, where, settings.separator, settings.encoding, settings.fit).columns
        if "file_name" not in columns:
            continue
        if not settings.candidates(columns, "label"):
            rank_zero_info(
                f"{where} has no column of classes, so folders are classes: name one by label_column if not."
            )
            continue
        splits = {split_named(part) for part in folder.split("/")} - {""}
        found[folder] = Manifest(content, where, splits.pop() if len(splits) == 1 else "", folder)
    return list(found.values())


def _rows(source: Source, manifest: Manifest, settings: TableSettings, problems: Problems) -> list[_Row]:
    """What the rows of a table say, with the names that the source has for the files."""
    where = manifest.where
    table = read_table(manifest.content, where, settings.separator, settings.encoding, settings.fit)
    columns = settings.find(table.columns, where)
    rows = []
    for line, cells, overlong in table.rows:
        file, label, given = (unquoted(cells.get(columns.get(part, ""), "")) for part in ("file", "label", "split"))
        split = split_named(given) if given else manifest.split
        if overlong:
            problems.setdefault("have more cells than there are columns", []).append(f"line {line}")
        elif not file or not label:
            problems.setdefault("lack a file or a class", []).append(f"line {line}")
        elif given and not split:
            problems.setdefault(f"have a split that is none of {', '.join(SPLITS)}", []).append(
                f"line {line}: {given!r}"
            )
        else:
            rows.append(_Row(f"line {line}", file, label, split))
    return _located(rows, manifest, source, problems)


def _each_once(rows: Iterable[_Row], problems: Problems) -> list[Listed]:
    """The files that the rows agree on."""
    found: dict[str, list[Listed]] = {}
    for row in rows:
        found.setdefault(row.file, []).append(Listed(row.file, normal(row.label), row.split))
    files = []
    for name, entries in found.items():
        if len({*entries}) > 1:
            both = " and ".join(repr("/".join(filter(None, entry[:0:-1]))) for entry in dict.fromkeys(entries))
            problems.setdefault("name a file as of several classes or splits", []).append(f"{name!r} as {both}")
            continue
        if len(entries) > 1:
            problems.setdefault("name a file twice", []).append(repr(name))
        files.append(entries[0])
    return files


def _report(where: str, problems: Problems, on_error: str) -> None:
    if not problems:
        return
    kinds = "; ".join(f"{len(rows)} {kind} ({_shown(rows)})" for kind, rows in problems.items())
    what = f"{where} has {sum(map(len, problems.values()))} rows that cannot be used: {kinds}"
    if on_error == "raise":
        raise ValueError(f"{what}: mend or remove them, or set on_error: skip to leave them out.")
    rank_zero_warn(f"{what}: they are left out.")


def _shown(rows: Sequence[str], shown: int = 5) -> str:
    more = f" and {len(rows) - shown} more" if len(rows) > shown else ""
    return ", ".join(row if len(row) <= _LONGEST else f"{row[:_LONGEST]}..." for row in rows[:shown]) + more


def _located(rows: Sequence[_Row], manifest: Manifest, source: Source, problems: Problems) -> list[_Row]:
    """The rows whose file the source has, with its name there."""
    names = FileNames(source, manifest.below, manifest.folder)
    found = []
    for row, files in zip(rows, names.find([row.file for row in rows]), strict=True):
        if len(files) == 1:
            found.append(row._replace(file=files[0]))
        elif files:
            text = f"{row.file!r}, which may be {' or '.join(map(repr, files[:3]))}"
            problems.setdefault("name a file without its ending that several have", []).append(text)
        else:
            problems.setdefault(f"name files that {source.label} lacks", []).append(repr(row.file))
    return found
