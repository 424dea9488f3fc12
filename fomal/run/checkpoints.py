"""The checkpoints of a run on disk: the last and the one before, each whole or named as not."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import torch

from fomal.utils.checks import first_line
from fomal.utils.files import refuse_unreadable

LAST, PREVIOUS = "last.ckpt", "previous.ckpt"


def verify(path: Path) -> None:
    """Read the whole file and compare its checksums; nothing in it is run.

    Raises:
        ValueError: it is cut short, a byte has changed, or it is no file of torch's.
    """
    try:
        with zipfile.ZipFile(path) as file:
            wrong = file.testzip()
        if wrong is not None:
            raise ValueError(f"the checksum of its part {wrong} is wrong")
        torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # zipfile and torch raise many kinds for a damaged file
        message = f"{path} cannot be read as a checkpoint: it is cut short or damaged ({first_line(error)})"
        raise ValueError(message) from error


def meta_iterations(path: Path) -> int:
    """For how many meta-iterations a checkpoint has been trained; nothing else of it is read."""
    return int(torch.load(path, map_location="cpu", weights_only=True, mmap=True)["global_step"])


def publish(unfinished: Path, path: Path) -> None:
    """Let a written checkpoint take the place of `path`, which is kept beside it as the previous one.

    A crash of the machine at any moment leaves one of the two whole.

    Raises:
        ValueError: what was written is not what is read back; `path` stays.
    """
    with unfinished.open("rb") as file:
        os.fsync(file.fileno())
    verify(unfinished)
    if path.exists():
        path.replace(path.with_name(PREVIOUS))
    unfinished.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def newest(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint of a folder that is whole, if any, and what is wrong with those passed over."""
    problems = []
    for path in (folder / LAST, folder / PREVIOUS):
        if not path.is_file():
            continue
        try:
            refuse_unreadable(path)
            verify(path)
        except (ValueError, OSError) as error:
            problems.append(str(error))
        else:
            return path, problems
    return None, problems


def find(path: str | Path) -> tuple[Path, list[str]]:
    """The checkpoint meant by a path: a file, the folder it is in, that of its run, or that of a run's versions.

    Of several versions, the newest that has a checkpoint; of several checkpoints, the last, or before it the only one.

    Returns:
        The file, and what is wrong with newer ones that were passed over.

    Raises:
        FileNotFoundError: there is no such path, or no such checkpoint in the folder; says what there is.
        ValueError: none of the folder's is whole, or there are several.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        return path, []
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: there is no such file or folder.")
    for folder in (path, path / "checkpoints", *(version / "checkpoints" for version in version_folders(path))):
        found, problems = newest(folder)
        if found is not None:
            return found, problems
        if problems:  # a damaged run is not passed over for an older one
            raise ValueError("; ".join(problems))
        others = sorted(folder.glob("*.ckpt"))
        if len(others) > 1:
            raise ValueError(f"{folder} has several checkpoints, {_some(others)}: give one of them.")
        if others:
            return others[0], []
    inside = sorted({file.parent for file in path.glob("**/*.ckpt")})
    if inside:
        raise FileNotFoundError(f"{path} has no checkpoint of its own; there are some in {_some(inside)}: give one.")
    there = sorted(path.iterdir())
    raise FileNotFoundError(f"{path} has no checkpoint; it has {_some(there) if there else 'nothing'}.")


def version_folders(runs: Path) -> list[Path]:
    """The folders `version_N` in a folder, the newest first."""
    found = [folder for folder in runs.glob("version_*") if folder.name.removeprefix("version_").isdecimal()]
    return sorted(found, key=lambda folder: int(folder.name.removeprefix("version_")), reverse=True)


def _some(paths: list[Path]) -> str:
    return ", ".join(str(path) if path.is_dir() else path.name for path in paths[:4]) + ", ..." * (len(paths) > 4)
