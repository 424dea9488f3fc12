"""Keep the last state of a training run on disk, also when it is interrupted."""

from __future__ import annotations

import os
import shlex
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import rank_zero_info

from fomal.callbacks.folder import is_trial, run_folder
from fomal.checks import positive
from fomal.data.episode import Episode
from fomal.files import keep_earlier

Handler = Callable[[int, FrameType | None], Any] | int | None


class SaveLast(Checkpoint):
    """Writes `checkpoints/last.ckpt` every so many meta-iterations, at the end, and on Ctrl-C.

    On Ctrl-C the running meta-iteration is finished first, so that the checkpoint is a state the uninterrupted run
    passes through; a second Ctrl-C stops at once. The file is replaced in one step: there is always a whole one.
    Lightning's `ModelCheckpoint` can be used beside it, e.g. to keep the best.

    Args:
        every_n_meta_iterations: how often to save during training.
        dirpath: folder; None means `checkpoints` in the run's folder.
    """

    def __init__(self, every_n_meta_iterations: int = 1000, dirpath: str | None = None) -> None:
        positive(every_n_meta_iterations=every_n_meta_iterations)
        self.every = every_n_meta_iterations
        self.dirpath = dirpath
        self._training = self._in_step = self._interrupted = False
        self._previous: Handler = None
        self._saved_at = -1

    def path(self, trainer: L.Trainer) -> Path:
        """The checkpoint file."""
        return Path(self.dirpath or run_folder(trainer) / "checkpoints") / "last.ckpt"

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep what an earlier run left in the same place, and listen for Ctrl-C."""
        self._training, self._in_step, self._interrupted = True, False, False
        self._saved_at = -1
        path = self.path(trainer)  # in every process: it broadcasts
        if trainer.is_global_zero and not is_trial(trainer):
            keep_earlier(path)
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._on_sigint)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Episode, batch_idx: int
    ) -> None:
        """From here to the end of the step, weights and optimiser state do not belong together."""
        self._in_step = True

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Episode, batch_idx: int
    ) -> None:
        """Save when it is time, or when Ctrl-C was pressed during the step."""
        self._in_step = False
        if self._interrupted:
            raise KeyboardInterrupt
        if trainer.global_step % self.every == 0:
            self._save(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save the final state."""
        self._save(trainer)
        self._leave()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Save on Ctrl-C, unless it was pressed twice."""
        resumable = self._training and not self._in_step and not is_trial(trainer)
        if isinstance(exception, KeyboardInterrupt) and resumable:
            self._save(trainer)
            command = f"fomal fit --ckpt_path {shlex.quote(str(self.path(trainer)))}"
            rank_zero_info(f"Stopped after meta-iteration {trainer.global_step}; to go on: {command}")
        self._leave()

    def _on_sigint(self, number: int, frame: FrameType | None) -> None:
        if self._in_step and not self._interrupted:
            self._interrupted = True
            rank_zero_info("Ctrl-C: finishing this meta-iteration and saving; press again to stop at once.")
        else:
            raise KeyboardInterrupt

    def _leave(self) -> None:
        self._training = False
        if self._previous is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, self._previous)
            self._previous = None

    def _save(self, trainer: L.Trainer) -> None:
        if is_trial(trainer) or trainer.global_step == self._saved_at:
            return
        path = self.path(trainer)
        unfinished = path.with_name(f".{path.name}.unfinished")
        try:
            trainer.save_checkpoint(unfinished, weights_only=False)  # with optimiser and loops
            if trainer.is_global_zero:
                os.replace(unfinished, path)
        finally:
            if trainer.is_global_zero:
                unfinished.unlink(missing_ok=True)
        self._saved_at = trainer.global_step
