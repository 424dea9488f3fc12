"""Finding out which image file belongs to which class, and to which split, by the folders that it lies in."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePosixPath
from typing import NamedTuple

from fomal.data.images.selection import EVERY, Selection
from fomal.data.images.source import Source
from fomal.utils.output import rank_zero_info

# As the library datasets of Hugging Face has them.
SPLIT_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
_WORD = "|".join(SPLIT_WORDS)
_SPLIT = re.compile(rf"({_WORD})[-_. ]?(set|data|split|images)?")


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
    """The image files of a source, with their classes.

    Attributes:
        files: sorted by label and name.
        empty: folders of classes without an image.
        left_out: the files that are not listed, by name, with a word for the reason.
    """

    files: list[Listed]
    empty: list[str]
    left_out: Mapping[str, str] = {}


def split_named(name: str) -> str:
    """The split that a folder or a CSV value names, such as Training or test_set; empty for another name."""
    found = _SPLIT.fullmatch(name.strip().casefold())
    return SPLIT_WORDS[found[1]] if found else ""


def split_within(name: str) -> str:
    """The split of which a word is part of a name, such as seg_train; empty where none or several are."""
    found = {SPLIT_WORDS[word] for word in re.split(r"[^a-z]+", name.casefold()) if word in SPLIT_WORDS}
    return found.pop() if len(found) == 1 else ""


def by_folders(source: Source, selection: Selection = EVERY) -> Listing:
    """The class of a file is its folder, apart from a folder that names a split, such as train/, Val/ or testing/.

    The folders of splits may lie above those of the classes, or below. Folders that hold nothing but one other folder
    are passed over.

    Raises:
        ValueError: there are no class folders, or one class lies within another, or two have one name; some folders
            name splits and others do not.
    """
    images, left_out = selection.split(source, source.images)
    outside = [name for name in images if "/" not in name]
    if not images or outside:
        found = f"images outside any folder, e.g. {outside[0]!r}" if outside else "no images"
        raise ValueError(
            f"{source.label} has {found}: put the images of each class into a folder of its name, "
            f"or name their classes in a CSV file, labels.{_others(source)}"
        )
    folders = {name: PurePosixPath(name).parent.parts for name in images}
    level = _level_of_splits(set(folders.values()), source)
    splits = dict.fromkeys(images, "")
    if level is not None:
        splits = {name: _split_of(parts[level]) for name, parts in folders.items()}
        folders = {name: parts[:level] + parts[level + 1 :] for name, parts in folders.items()}
    top = _common_top(set(folders.values()))
    files = [Listed(name, "/".join(parts[top:]), splits[name]) for name, parts in folders.items()]
    _refuse_nested({file.label for file in files}, source)
    return listed(files, source, _empty_folders(source, images), {**source.left_out, **left_out})


def _others(source: Source) -> str:
    """How many other files there are, for a message about images that lack."""
    return f" It has {len(source.names)} files, e.g. {source.names[0]!r}." if source.names and not source.images else ""


def _split_of(folder: str) -> str:
    return split_named(folder) or split_within(folder)


def _level_of_splits(folders: set[tuple[str, ...]], source: Source) -> int | None:
    """How deep the folders that name splits lie, from 0; None where there are none.

    Raises:
        ValueError: some of the folders at a level name splits and others do not, or splits have no classes.
    """
    depth = min(map(len, folders))
    for level in range(depth):
        names = {parts[level] for parts in folders}
        if all(map(split_named, names)) or (all(map(_split_of, names)) and len({*map(_split_of, names)}) > 1):
            rest = {parts[:level] + parts[level + 1 :] for parts in folders}
            if () in rest or (len(rest) == 1 and depth == level + 1):
                raise ValueError(
                    f"{source.label} has images directly in folders of splits, {enumerated(sorted(names))}: put those "
                    f"of each class into a folder of its name there, or name their classes in a CSV file, labels."
                )
            return level
    for level in range(max(map(len, folders)) - 1):  # of folders that hold others
        holding = sorted({parts[level] for parts in folders if len(parts) > level + 1})
        named = [name for name in holding if split_named(name)]
        by_word = [name for name in holding if _split_of(name)]
        if named or len({*map(_split_of, by_word)}) > 1:
            shown = named or by_word
            other = min("/".join(parts) for parts in folders if len(parts) <= level or parts[level] not in shown)
            raise ValueError(
                f"{source.label} has folders of splits, {enumerated(shown)}, but also {other!r}: every image must lie "
                f"in a class folder of one of them; move or rename folders, or name the classes in a CSV file, labels."
            )
    lying = sorted({parts[-1] for parts in folders if split_named(parts[-1])})
    if lying:
        rank_zero_info(
            f"{source.label}: {enumerated(lying)} are classes and no splits, since other classes lie beside."
        )
    return None


def _common_top(folders: set[tuple[str, ...]]) -> int:
    """How many folders all share, as far as they are no class."""
    depth = 0
    while len({parts[: depth + 1] for parts in folders}) == 1 and min(map(len, folders)) > depth + 1:
        depth += 1
    return depth


def _refuse_nested(labels: set[str], source: Source) -> None:
    for label in sorted(labels):
        for parent in PurePosixPath(label).parents:
            if str(parent) in labels:
                raise ValueError(
                    f"{source.label} has images in {str(parent)!r} and in {label!r} within it: "
                    f"move them, so that each class is one folder."
                )


def _empty_folders(source: Source, images: Sequence[str]) -> list[str]:
    """Folders without any file, and those beside classes that hold no image."""
    holding, classes = _folders_of(source.names), _folders_of(source.images)
    beside = {name.rpartition("/")[0].rpartition("/")[0] for name in images}
    return [
        folder
        for folder in source.folders
        if folder not in holding or (folder not in classes and folder.rpartition("/")[0] in beside)
    ]


def _folders_of(names: Iterable[str]) -> set[str]:
    """The folders that the files lie in, however deep."""
    nearest = {name.rpartition("/")[0] for name in names}
    return nearest | {str(parent) for folder in nearest for parent in PurePosixPath(folder).parents}


def listed(files: Iterable[Listed], source: Source, empty: Sequence[str], left_out: Mapping[str, str]) -> Listing:
    """Sorted, and class names in one normal form; classes that differ in nothing else are refused.

    Raises:
        ValueError: there are such classes.
    """
    spellings: dict[str, str] = {}
    composed = []
    for file in files:
        label = normal(file.label)
        before = spellings.setdefault(label, file.label)
        if before != file.label:
            raise ValueError(
                f"{source.label} has two classes with one name, {label!r}, which differ in how its letters are "
                f"encoded ({before!a} and {file.label!a}): put their images into one."
            )
        composed.append(file._replace(label=label))
    return sorted_listing(composed, empty, left_out)


def sorted_listing(
    files: Iterable[Listed], empty: Sequence[str] = (), left_out: Mapping[str, str] | None = None
) -> Listing:
    """The files in the order that `Listing` has them."""
    return Listing(sorted(files, key=lambda file: (file.label, file.name)), list(empty), left_out or {})


def normal(name: str) -> str:
    """A class's name in Unicode's composed form: file systems differ in that they keep."""
    return unicodedata.normalize("NFC", name)


def enumerated(names: Iterable[str], shown: int = 5) -> str:
    """The first names, and how many more there are."""
    listed = list(names)
    more = f" and {len(listed) - shown} more" if len(listed) > shown else ""
    return ", ".join(map(repr, listed[:shown])) + more
