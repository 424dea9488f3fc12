"""Where the files of a run belong."""

from __future__ import annotations

from pathlib import Path

import lightning as L
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

METRICS = ("train", "val")
"""How folders end that `ModelCheckpoint(filename="{val/loss}")` makes of the slash in a metric's name."""


def run_folder(trainer: L.Trainer) -> Path:
    """The run's folder: that of the checkpoint being tested, else the logger's, else `default_root_dir`.

    Must be called in every process: the first one's answer is broadcast.
    """
    if trainer.state.fn != "fit" and trainer.ckpt_path:
        folder = Path(trainer.ckpt_path).parent
        while folder.name.endswith(METRICS):
            folder = folder.parent
        return folder.parent if folder.name == "checkpoints" else folder
    folder = Path(trainer.log_dir or trainer.default_root_dir)
    logger = trainer.logger
    if logger is None or isinstance(logger, CSVLogger | TensorBoardLogger):
        return folder
    # Of other loggers Lightning knows only the folder that all runs share.
    own = [str(part) for part in (logger.name, logger.version) if part]
    return Path(trainer.strategy.broadcast(str(folder.joinpath(*own))))


def is_trial(trainer: L.Trainer) -> bool:
    """Tell whether this is a `fast_dev_run`, which leaves no files."""
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined] # set by a helper of the trainer
