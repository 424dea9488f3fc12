"""Where the files of a run belong."""

from __future__ import annotations

from pathlib import Path

import lightning as L


def run_folder(trainer: L.Trainer) -> Path:
    """The run's folder: that of the checkpoint being tested, else the logger's, else `default_root_dir`."""
    if trainer.state.fn != "fit" and trainer.ckpt_path:
        folder = Path(trainer.ckpt_path).parent
        return folder.parent if folder.name == "checkpoints" else folder
    return Path(trainer.log_dir or trainer.default_root_dir)


def is_trial(trainer: L.Trainer) -> bool:
    """Whether this is a `fast_dev_run`, which leaves no files."""
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined] # set by a helper of the trainer
