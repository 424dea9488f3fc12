"""A start that fails leaves no run folder: what it wrote before the first meta-iteration is taken away again."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

import lightning as L

from fomal.callbacks.folder import is_trial, run_folder
from fomal.utils.files import keep_earlier

_OF_A_START = ("config.yaml", "metrics.csv", "hparams.yaml", "checkpoints")


class Start:
    """The folders of a run as they are before it.

    Args:
        trainer: not run yet. Must be made in every process.
    """

    def __init__(self, trainer: L.Trainer) -> None:
        self._kept: list[tuple[Path, Path]] = []
        self._new: list[Path] = []  # folders that the run will make
        self._above: list[Path] = []  # and those it will make above them, the deepest first
        self._old: list[Path] = []  # files that it will write into folders that are there
        self._overwritten: dict[Path, bytes] = {}  # and those there that it writes again
        if is_trial(trainer):
            return
        logs = [Path(logger.log_dir) for logger in trainer.loggers if logger.log_dir]
        for folder in dict.fromkeys([run_folder(trainer), *logs]):
            if folder.exists():
                self._old += [folder / name for name in _OF_A_START if not (folder / name).exists()]
                if (settings := folder / "hparams.yaml").is_file():
                    self._overwritten[settings] = settings.read_bytes()
            else:
                self._new.append(folder)
                self._above += [part for part in folder.parents if not part.exists()]

    def keep(self, path: Path) -> None:
        """Give an earlier run's file another name; undone with the start."""
        if (kept := keep_earlier(path)) is not None:
            self._kept.append((kept, path))
            self._old.append(path)

    def undo(self) -> None:
        """Take away what the start wrote, unless there is a checkpoint already; in the first process alone."""
        if any(path.is_dir() and any(path.rglob("*.ckpt")) for path in (*self._new, *self._old)):
            return
        for folder in self._new:
            shutil.rmtree(folder, ignore_errors=True)
        for path in self._old:
            with contextlib.suppress(OSError):  # it is not there, or a folder with something in it
                path.rmdir() if path.is_dir() else path.unlink()
        for folder in sorted(set(self._above), key=lambda path: -len(path.parts)):
            with contextlib.suppress(OSError):
                folder.rmdir()
        for path, content in self._overwritten.items():
            path.write_bytes(content)
        for kept, path in self._kept:
            if not path.exists():
                kept.rename(path)
