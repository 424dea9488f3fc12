"""Dividing classes into those trained on, validated on and tested on."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Literal

from fomal.data.images.listing import Listed, enumerated, normal
from fomal.tasks.sampler import SPLITS, shuffled
from fomal.utils.output import rank_zero_warn

How = Literal["auto", "given", "lists", "share"]
ClassList = Sequence[str] | str | None
"""Names of classes, or a file with one on each line."""


def partition(
    files: Sequence[Listed],
    how: How = "auto",
    lists: Mapping[str, ClassList] | None = None,
    shares: tuple[float, float] = (0.2, 0.2),
    seed: int = 0,
) -> dict[str, list[str]]:
    """Divide the classes of `files` among the splits.

    Args:
        files: the images with their classes.
        how: "given": as the files say; "lists": as `lists` says, and classes in none of them are left out; "share": by
            a random choice; "auto": the first of these that there is something for.
        lists: classes by split.
        shares: of the classes, for validation and for testing; rounded up, so that a positive share is no empty one.
        seed: of the random choice.

    Returns:
        The names of each split's classes; no split has a class of another. Without validation classes "val" has
        those of "train"; a split without classes is left out.

    Raises:
        FileNotFoundError: a list's file does not exist.
        ValueError: a class is in two splits, a listed class does not exist, or nothing is left to train on.
    """
    lists = {split: names for split, names in (lists or {}).items() if names is not None}
    given = any(file.split for file in files)
    if how == "auto":
        how = "lists" if lists else "given" if given else "share"
    if how == "given" and not given:
        raise ValueError(
            "split='given' needs folders train/, val/ and test/ or a column split in data.labels, and there is "
            "neither: use data.split: share, or lists of classes."
        )
    if how == "lists" and not lists:
        raise ValueError("split='lists' needs data.train_classes, and data.val_classes and data.test_classes.")
    if how == "given":
        splits = {split: _unique(file.label for file in files if file.split == split) for split in SPLITS}
    elif how == "lists":
        splits = _listed({file.label for file in files}, lists)
    else:
        splits = _shared(_unique(sorted(file.label for file in files)), shares, seed)
    _refuse_overlap(splits)
    splits = {split: names for split, names in splits.items() if names}
    if "train" in splits:
        splits.setdefault("val", splits["train"])
    return splits


def _unique(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))


def _listed(there: set[str], lists: Mapping[str, ClassList]) -> dict[str, list[str]]:
    splits = {}
    for split, names in lists.items():
        names = [normal(name) for name in (_read_list(names, split) if isinstance(names, str) else names or ())]
        unknown = [name for name in names if name not in there]
        if unknown:
            raise ValueError(
                f"{split}_classes names classes that there are not: {enumerated(unknown)}; "
                f"there are {enumerated(sorted(there))}."
            )
        if len(set(names)) < len(names):
            twice = _unique(name for name in names if names.count(name) > 1)
            raise ValueError(f"{split}_classes names {enumerated(twice)} twice.")
        splits[split] = names
    return splits


def _read_list(path: str, split: str) -> list[str]:
    file = Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(
            f"{split}_classes={path!r} is no file: give a list of classes, or a file with one name on each line."
        )
    lines = (line.strip() for line in file.read_text("utf-8-sig").splitlines())
    return [line for line in lines if line]


def _shared(names: list[str], shares: tuple[float, float], seed: int) -> dict[str, list[str]]:
    val, test = (math.ceil(Fraction(str(share)) * len(names)) for share in shares)  # 0.07 of 100 is 7, not 8
    if val + test >= len(names):
        raise ValueError(
            f"val_share={shares[0]} and test_share={shares[1]} leave none of the {len(names)} classes for training: "
            f"use smaller shares, of which 0 leaves a split out, or lists of classes, or give more classes."
        )
    order = [names[i] for i in shuffled(seed, len(names)).tolist()]
    return {"val": order[:val], "test": order[val : val + test], "train": order[val + test :]}


def _refuse_overlap(splits: Mapping[str, Sequence[str]]) -> None:
    """Raise ValueError for a class in two splits; warn of classes whose names differ in capitals alone."""
    for i, split in enumerate(SPLITS):
        for other in SPLITS[i + 1 :]:
            both = sorted(set(splits.get(split, ())) & set(splits.get(other, ())))
            if both:
                raise ValueError(
                    f"the splits {split} and {other} have the same classes, {enumerated(both)}, but a few-shot learner "
                    f"is tested on classes it has not seen: use data.split: share, which divides the classes of all "
                    f"folders anew, or lists of classes."
                )
            spellings = {name.casefold(): name for name in splits.get(split, ())}
            alike = [name for name in splits.get(other, ()) if name.casefold() in spellings]
            if alike:
                pairs = enumerated(f"{spellings[name.casefold()]} and {name}" for name in alike)
                rank_zero_warn(
                    f"the splits {split} and {other} have classes whose names differ in capitals alone, {pairs}: if "
                    f"they are the same, give them one name."
                )
