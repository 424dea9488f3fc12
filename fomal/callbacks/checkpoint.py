"""Keep the last state of a training run on disk, also when it is interrupted."""

from __future__ import annotations

import io
import shlex
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint

from fomal.callbacks.folder import is_trial, run_folder
from fomal.callbacks.signals import requeue, requeue_signal
from fomal.learner.meta_learner import MetaLearner
from fomal.learner.replicas import Replicas, replica_checkpoint, replica_folder
from fomal.loggers import survive_full_disks
from fomal.run.checkpoints import LAST, PREVIOUS, publish
from fomal.run.stop_signals import EXIT_CODE, Handlers, leave
from fomal.utils.checks import positive
from fomal.utils.files import keep_earlier
from fomal.utils.output import rank_zero_info
from fomal.utils.processes import together


class SaveLast(Checkpoint):
    """Writes `checkpoints/last.ckpt` every so many meta-iterations, at the end, and when the run is asked to stop.

    The one before stays as `previous.ckpt`. A file takes its place in one step, after it has been read back, so there
    is always a whole one. A checkpoint comes after the validation that is due at its meta-iteration, and after the
    figures are written to the log: a run that goes on from it logs what an uninterrupted one does.

    On Ctrl-C, SIGTERM or, under SLURM, SIGUSR1, to any process, all finish the running meta-iteration and save; they
    end with exit code 130 for Ctrl-C and 143 otherwise, and after SIGUSR1 the job is put back into the queue. Ctrl-C
    once more stops at once. With several processes a validation is finished first, unless it had yet to start.
    Lightning's `ModelCheckpoint` can be used beside it, e.g. to keep the best.

    Of `Replicas`, each replica's own checkpoint is written into a folder of its own, too, as that of a run alone.

    Args:
        every_n_meta_iterations: how often to save during training.
        dirpath: folder; None means `checkpoints` in the run's folder.
    """

    def __init__(self, every_n_meta_iterations: int = 1000, dirpath: str | None = None) -> None:
        positive(every_n_meta_iterations=every_n_meta_iterations)
        self.every_n_meta_iterations = every_n_meta_iterations
        self.dirpath = dirpath
        self._handlers = Handlers()
        self._learner: MetaLearner | Replicas | None = None
        self._asked = 0  # the signal that asked this process to stop
        self._requeue: int | None = None
        self._saved_at = -1
        self._validation_due = False
        self._validated_at = -1

    def path(self, trainer: L.Trainer) -> Path:
        """The checkpoint file; must be called in every process."""
        return Path(self.dirpath or run_folder(trainer) / "checkpoints") / LAST

    def state_dict(self) -> dict[str, Any]:
        """Tell whether the validation of the checkpoint's meta-iteration is still to be done."""
        return {"validation_due": self._validation_due}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See `state_dict`."""
        self._validation_due = state_dict["validation_due"]

    # -- when

    def on_sanity_check_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """There is nothing to save yet."""
        self._handlers.install({signal.SIGTERM}, leave)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep what another run left in the same place, listen for signals, and make up an interrupted validation."""
        self._learner = pl_module if isinstance(pl_module, MetaLearner | Replicas) else None
        self._validated_at = -1
        self._asked, self._saved_at = 0, trainer.global_step if trainer.ckpt_path else -1
        if self._learner is not None:
            self._learner.watch.asked = self._learner.watch.stopping = 0  # of an earlier run
        if is_trial(trainer):
            return
        if trainer.is_global_zero:
            survive_full_disks(trainer.loggers)
        path = self.path(trainer)  # in every process: it broadcasts
        own = [path, path.with_name(PREVIOUS)]
        goes_on = bool(trainer.ckpt_path) and Path(str(trainer.ckpt_path)).resolve() in [file.resolve() for file in own]
        if isinstance(self._learner, Replicas):
            folder = run_folder(trainer)
            each = [_replica_path(folder, place) for place in range(len(self._learner.learners))]
            own += [file for last in each for file in (last, last.with_name(PREVIOUS))]
        if trainer.is_global_zero and not goes_on:
            for file in own:
                keep_earlier(file)
        self._requeue = requeue_signal(trainer)
        self._handlers.install({signal.SIGINT, signal.SIGTERM, *filter(None, [self._requeue])}, self._on_signal)
        # Signals reach the other processes with the outer gradient; Lightning's broadcast in every step is not needed.
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
        if self._validation_due:
            self._validation_due = False
            _validate(trainer)
            _uncount_validation(trainer)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Save when it is time: here the meta-iteration before is complete, with its validation and its log."""
        if self._stopping(trainer):
            self._stop(trainer)
        if trainer.global_step % self.every_n_meta_iterations == 0 and trainer.global_step:
            self._save(trainer)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop before a validation rather than after it."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking and self._stopping(trainer):
            self._stop(trainer, validation_due=True)

    def on_validation_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        """Stop within a validation, which one process can do by itself."""
        if trainer.world_size == 1 and self._asked and not trainer.sanity_checking:
            self._stop(trainer, validation_due=True)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Remember when."""
        if not trainer.sanity_checking:
            self._validated_at = trainer.global_step

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save the final state."""
        self._save(trainer, final=True)
        self._handlers.restore()
        if self._asked and trainer.world_size == 1:  # while it was written
            self._stop(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Put the earlier signal handlers back."""
        self._handlers.restore()

    # -- stopping

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._asked:
            raise KeyboardInterrupt
        self._asked = signal.SIGUSR1 if number == self._requeue else number
        if self._learner is not None:
            self._learner.watch.asked = self._asked
        text = "; press again to stop at once." if number == signal.SIGINT else "."
        name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        rank_zero_info(f"{name}: finishing this meta-iteration and saving{text}")

    def _stopping(self, trainer: L.Trainer) -> int:
        """The signal by which all processes stop here; 0 for none."""
        return self._asked if self._learner is None else self._learner.watch.ends(trainer.world_size)

    def _stop(self, trainer: L.Trainer, validation_due: bool = False) -> None:
        number = self._stopping(trainer)
        self._validation_due = validation_due
        self._save(trainer)
        command = f"fomal fit --ckpt_path {shlex.quote(str(self.path(trainer)))}"
        rank_zero_info(f"Stopped after meta-iteration {trainer.global_step}; to go on: {command}")
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        if number == signal.SIGUSR1 and trainer.is_global_zero:
            requeue()
        raise SystemExit(EXIT_CODE)

    # -- saving

    def _save(self, trainer: L.Trainer, final: bool = False) -> None:
        step = trainer.global_step
        if is_trial(trainer) or (step == self._saved_at and not self._validation_due):
            return
        if self._learner is not None:
            self._learner.watch.refuse_nonfinite(step)
        if isinstance(self._learner, Replicas):
            self._learner.stop_nonfinite(step)
        for logger in trainer.loggers:
            logger.save()  # a killed process writes nothing more
        path, folder = self.path(trainer), run_folder(trainer)  # in every process: they broadcast
        unfinished = path.with_name(f".{path.name}.unfinished")
        try:
            with _between_steps(trainer, self._validated_at == step), together():
                trainer.save_checkpoint(unfinished, weights_only=False)  # with optimiser and loops
            if trainer.is_global_zero:
                publish(unfinished, path)
                if isinstance(self._learner, Replicas):
                    _save_replicas(path, folder)
        except OSError as error:
            kept = f"that of meta-iteration {self._saved_at} is intact" if self._saved_at > 0 else "there is none yet"
            raise OSError(
                f"the checkpoint of meta-iteration {step} could not be written to {path.parent}: {error}. Of earlier "
                f"ones {kept}. Make room and go on with --ckpt_path last."
            ) from error
        finally:
            if trainer.is_global_zero:
                unfinished.unlink(missing_ok=True)
        self._saved_at = step
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                if hasattr(logger, "log_checkpoint"):
                    logger.log_checkpoint(path, step, final)


def _replica_path(folder: Path, place: int) -> Path:
    return folder / replica_folder(place) / "checkpoints" / LAST


def _save_replicas(path: Path, folder: Path) -> None:
    """Write what each replica would have as a run of its own; that of one that has stopped stays as it is."""
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    for place in range(len(checkpoint["fomal"]["replicas"])):
        if place in checkpoint["fomal"]["stopped"]:
            continue
        own = _replica_path(folder, place)
        own.parent.mkdir(parents=True, exist_ok=True)
        unfinished = own.with_name(f".{LAST}.unfinished")
        try:
            content = io.BytesIO()  # a full disk is an OSError then, which torch would not say
            torch.save(replica_checkpoint(checkpoint, place), content)
            unfinished.write_bytes(content.getbuffer())
            publish(unfinished, own)
        finally:
            unfinished.unlink(missing_ok=True)


@contextmanager
def _between_steps(trainer: L.Trainer, validated: bool) -> Iterator[None]:
    """Let Lightning's counters stand as at the end of the last step, whatever has been begun since.

    Lightning knows two kinds of checkpoints between steps by their counters. One of the end of a step it goes on from
    without validating again; the other puts the logging off by one step where a validation was due.
    """
    loop = trainer.fit_loop.epoch_loop
    progress = loop.batch_progress
    parts: list[Any] = [progress.total, progress.current]
    validations: list[Any] = [loop.val_loop.batch_progress.total, loop.val_loop.batch_progress.current]
    before = [vars(part).copy() for part in (*parts, *validations)]
    stepped = loop._batches_that_stepped
    for part in parts:
        part.ready = part.started = part.processed
        part.completed = part.processed - 1
    loop._batches_that_stepped = parts[0].processed - 1
    if validated:
        _uncount_validation(trainer)
    try:
        yield
    finally:
        for part, values in zip((*parts, *validations), before, strict=True):
            vars(part).update(values)
        loop._batches_that_stepped = stepped


def _uncount_validation(trainer: L.Trainer) -> None:
    """Leave the batches of the last validation to Lightning to count, which it does when it goes on from its step."""
    progress = trainer.fit_loop.epoch_loop.val_loop.batch_progress
    total, current = vars(progress.total), vars(progress.current)
    for name, count in current.items():
        total[name] -= count
        current[name] = 0


def _validate(trainer: L.Trainer) -> None:
    """Validate now, as the loop would after a step."""
    loop = trainer.fit_loop.epoch_loop
    trainer.validating = True
    loop.val_loop.restarting = False
    loop.val_loop.run()
    trainer.training = True
