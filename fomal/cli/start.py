"""A start that fails leaves no files: what it wrote before its first batch is taken away again."""

from __future__ import annotations

import contextlib
import re
import shutil
from pathlib import Path

import lightning as L

from fomal.callbacks.folder import is_trial, run_folder
from fomal.loggers import WandbStart

_OF_A_START = re.compile(r"(config|metrics)(_\d+)?\.(yaml|csv)|hparams\.yaml|events\.out\.tfevents\..*|.*\.ckpt")
_REPLICAS = "replica_*"

Files = dict[Path, tuple[int, int, int]]
"""Paths with inode, time of the last change and size, by which a file is known under another name."""


class Start:
    """The folders of a run as they are before it.

    Args:
        trainer: not run yet. Must be made in every process.
    """

    def __init__(self, trainer: L.Trainer) -> None:
        self._new: list[Path] = []  # folders that the run will make for itself
        self._above: list[Path] = []  # and those it will make for others too
        self._there: dict[Path, Files] = {}  # files in those that are there
        self._settings: dict[Path, bytes] = {}  # and those of them that loggers write again
        self._beside: set[Path] = set()  # in the folder of all runs, where the run's own is not known yet
        self._wandb = WandbStart(trainer.loggers)
        if is_trial(trainer):
            return
        folder = run_folder(trainer)
        logs = [Path(logger.log_dir) for logger in trainer.loggers if logger.log_dir]
        if trainer.logger is None or trainer.logger.version is not None:
            logs.insert(0, folder)
        self._beside = set(folder.glob("*"))
        self._above = [part for part in (folder, *self._wandb.folders) if not part.exists()]
        for place in dict.fromkeys(logs):
            if place.exists():
                self._there[place] = _files(place)
                if (settings := place / "hparams.yaml").is_file():
                    self._settings[settings] = settings.read_bytes()
            else:
                self._new.append(place)
        places = [*logs, folder, *self._wandb.folders]
        self._above += [part for place in places for part in place.parents if not part.exists()]

    def claim(self, folder: Path) -> None:
        """Learn the run's folder where its name was not known before the loggers started."""
        if folder not in self._there and folder not in self._new and folder not in self._beside:
            self._new.append(folder)

    def undo(self) -> None:
        """Put everything back, unless there is a checkpoint already; in the first process alone."""
        known = {about for files in self._there.values() for about in files.values()}
        saved = [path for folder in self._new for path in folder.rglob("*.ckpt")]
        for folder in self._there:
            saved += [path for path, about in _files(folder).items() if path.suffix == ".ckpt" and about not in known]
        if saved:
            return
        self._wandb.undo()
        for folder in self._new:
            shutil.rmtree(folder, ignore_errors=True)
        for folder, files in self._there.items():
            _put_back(folder, files)
        for path, content in self._settings.items():
            if not path.is_file() or path.read_bytes() != content:
                path.write_bytes(content)
        for folder in sorted(set(self._above), key=lambda path: -len(path.parts)):
            with contextlib.suppress(OSError):  # something is in it
                folder.rmdir()


def _files(folder: Path) -> Files:
    """The files in a run's folder that a start writes or gives other names."""
    parts = [part for own in (folder, *folder.glob(_REPLICAS)) for part in (own, own / "checkpoints") if part.is_dir()]
    found: Files = {}
    for path in (path for part in parts for path in part.iterdir()):
        if _OF_A_START.fullmatch(path.name) and path.is_file():
            about = path.stat()
            found[path] = about.st_ino, about.st_mtime_ns, about.st_size
    return found


def _put_back(folder: Path, before: Files) -> None:
    """Give files their earlier names, and remove new ones and the folders that they were in."""
    now = _files(folder)
    names = {about: path for path, about in now.items()}
    for path, about in before.items():
        if now.get(path) != about and about in names:
            names[about].replace(path)
    for path in now.keys() - before.keys():
        path.unlink(missing_ok=True)
    emptied = [path for own in (*folder.glob(_REPLICAS), folder) for path in (own / "checkpoints", own)]
    for part in emptied[:-1]:
        with contextlib.suppress(OSError):  # it is not there, or something is in it
            part.rmdir()
