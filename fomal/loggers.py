"""Loggers that training does not depend on, and the figures they show."""

from __future__ import annotations

import csv
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import lightning as L
import numpy as np
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers import WandbLogger as LightningWandbLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image

from fomal.utils.files import WriteError, naming, write_csv
from fomal.utils.output import rank_zero_warn

_INIT_TIMEOUT = 30.0  # seconds; W&B's own is 90, and it takes ten more


class WandbLogger(LightningWandbLogger):
    """Lightning's logger for Weights & Biases, without which training goes on.

    A run that cannot be started online, for want of an account, a network or anything else, is one offline, after a
    line that says so and how to upload it later. What fails later is reported once for each kind of failure. Nothing
    is ever asked on the terminal. With the `id` of an earlier run, it goes on in that run.

    With `log_model`, W&B's copies of checkpoints are kept in `wandb` in `save_dir` rather than in the home folder,
    unless WANDB_DATA_DIR or WANDB_CACHE_DIR is set.

    Args:
        project: W&B's project; None means WANDB_PROJECT, else "fomal".
        offline: write the run to `save_dir` alone, for `wandb sync`.
        log_model: upload the last checkpoint as an artefact (true), each one that is saved ("all"), or none; offline,
            they are laid ready for `wandb sync`.
        kwargs: see Lightning's `WandbLogger`. All of `wandb.init`'s are taken too. W&B has 30 seconds to start,
            unless `settings` or WANDB_INIT_TIMEOUT say otherwise.
    """

    def __init__(
        self,
        project: str | None = None,
        offline: bool = False,
        log_model: Literal["all"] | bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(project=project or os.environ.get("WANDB_PROJECT", "fomal"), log_model=log_model, **kwargs)
        # The command line gives every argument of `wandb.init`, and so would undo Lightning's `resume`.
        given = {key: value for key, value in self._wandb_init.items() if value is not None}
        defaults: dict[str, Any] = {"resume": "allow"}
        if "WANDB_INIT_TIMEOUT" not in os.environ:
            defaults["settings"] = {"init_timeout": _INIT_TIMEOUT}
        self._wandb_init = defaults | given
        if {"resume_from", "fork_from"} & given.keys():
            del self._wandb_init["resume"]  # which W&B does not take beside them
        if offline:
            self._wandb_init["mode"] = "offline"
        self._reported: set[str] = set()

    # -- starting

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """W&B's run, started at the first use."""
        if self._experiment is None:
            self._start()
        return self._experiment

    def _start(self) -> None:
        """Start the run: as configured, else offline, else as one that does nothing."""
        import wandb

        if self._log_model:
            folder = Path(self._save_dir or ".").absolute() / "wandb"
            os.environ.setdefault("WANDB_DATA_DIR", str(folder))
            os.environ.setdefault("WANDB_CACHE_DIR", str(folder / "cache"))
        failures = []
        for mode in ("offline", "disabled"):
            try:
                self._start_or_raise()
                break
            except Exception as error:  # W&B raises many kinds
                failures.append(_reason(error))
                self._experiment = None
                wandb.teardown()  # else the id of the run that failed counts as in use
                self._wandb_init["mode"] = mode
        else:
            self._start_or_raise()
            rank_zero_warn(f"W&B can start no run ({failures[-1]}): nothing is logged to it.")
            return
        if failures:
            folder = Path(self.experiment.dir).parent
            rank_zero_warn(
                f"W&B could not start the run online ({failures[0]}): it goes on offline; `wandb sync {folder}` "
                f"uploads it later."
            )

    def _start_or_raise(self) -> None:
        import wandb

        joins = wandb.run is not None or getattr(self, "_attach_id", None) is not None
        mode = self._wandb_init.get("mode") or wandb.setup().settings.mode
        if not joins and mode == "online" and not wandb.login(prompt=False, verify=False):
            raise wandb.errors.UsageError("no account is set up here: use `wandb login`, or offline: true")
        _ = super().experiment

    # -- logging

    @contextmanager
    def _surviving(self, what: str) -> Iterator[None]:
        with surviving(what, self._reported):
            yield

    @rank_zero_only
    def log_hyperparams(self, params: Any) -> None:
        """Log the configuration."""
        with self._surviving("log the configuration"):
            super().log_hyperparams(params)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log metrics at a meta-iteration."""
        with self._surviving("log metrics"):
            super().log_metrics(metrics, step)

    @rank_zero_only
    def log_image(self, key: str, images: list[Any], step: int | None = None, **kwargs: Any) -> None:
        """Log images: arrays, Pillow's, or paths."""
        with self._surviving("log images"):
            super().log_image(key, images, step, **kwargs)

    @rank_zero_only
    def log_checkpoint(self, path: Path, meta_iteration: int, final: bool) -> None:
        """Log a checkpoint as an artefact, if `log_model` wants it.

        Args:
            path: the file; may be overwritten as soon as this returns.
            meta_iteration: the number of meta-iterations it has been trained for.
            final: whether it is the last one of the run.
        """
        if self._log_model is False or (self._log_model is True and not final):
            return
        import wandb

        with self._surviving("log a checkpoint"):
            name = self._checkpoint_name or f"model-{self.experiment.id}"
            artifact = wandb.Artifact(name, type="model", metadata={"meta_iteration": meta_iteration})
            artifact.add_file(str(path), name="model.ckpt", policy=self.add_file_policy)
            self.experiment.log_artifact(artifact, aliases=["latest", f"step{meta_iteration}"])

    @rank_zero_only
    def after_save_checkpoint(self, checkpoint_callback: ModelCheckpoint) -> None:
        """Log the checkpoints of Lightning's own callback."""
        with self._surviving("log a checkpoint"):
            super().after_save_checkpoint(checkpoint_callback)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Log the last checkpoints of Lightning's own callback."""
        with self._surviving("finish the run"):
            super().finalize(status)


class WandbStart:
    """Loggers for Weights & Biases before their runs start, so that a start which fails can be undone.

    Args:
        loggers: all of a trainer; other kinds, and runs that have started, are left alone.

    Attributes:
        folders: where the files of W&B's runs will be.
    """

    def __init__(self, loggers: Iterable[Any]) -> None:
        running = getattr(sys.modules.get("wandb"), "run", None) is not None
        own = [logger for logger in loggers if isinstance(logger, LightningWandbLogger)]
        self._loggers = [] if running else [logger for logger in own if logger._experiment is None]
        places = [logger.save_dir or os.environ.get("WANDB_DIR") or "." for logger in self._loggers]
        self.folders = [Path(place, "wandb") for place in places]
        links = [path for folder in self.folders for path in folder.glob("*") if path.is_symlink()]
        self._links = {path.absolute(): path.readlink() for path in links}  # to the newest run and its logs

    def undo(self) -> None:
        """End the runs as failed, and take away their files."""
        runs = [run for logger in self._loggers if (run := logger._experiment) and not getattr(run, "disabled", False)]
        for run in runs:
            folder = Path(run.dir).parent
            with surviving("take a run back", set()):
                run.finish(exit_code=1)
                sys.modules["wandb"].teardown()  # its process may still write
            shutil.rmtree(folder, ignore_errors=True)
            for link in [path for path in folder.parent.glob("*") if path.is_symlink() and not path.exists()]:
                link.unlink()
                if before := self._links.get(link.absolute()):
                    link.symlink_to(before)
            if not any(folder.parent.glob("*run-*")):
                shutil.rmtree(folder.parent / "cache", ignore_errors=True)


@contextmanager
def surviving(what: str, reported: set[str]) -> Iterator[None]:
    """Turn an exception from W&B into a warning, unless `what` is among those `reported` already."""
    try:
        yield
    except Exception as error:  # W&B raises many kinds
        if what not in reported:
            reported.add(what)
            rank_zero_warn(f"W&B could not {what} ({_reason(error)}): the run goes on, and is silent about it now.")


class CarefulWriter(ExperimentWriter):
    """Writes `metrics.csv` whole rows at a time; what cannot be written now is tried again with the next rows."""

    failed = False

    def save(self) -> None:
        """Write the rows that are new; warn once where that fails."""
        path, keys = Path(self.metrics_file_path), list(self.metrics_keys)
        if not self.metrics:
            return
        try:
            with naming(path):
                if self._record_new_keys() or not path.is_file():
                    self._write_all(path)
                else:
                    _append(path, self.metrics_keys, self.metrics)
        except WriteError as error:
            self.metrics_keys = keys
            if not self.failed:
                rank_zero_warn(f"{error} The run goes on, and keeps its rows in memory until they can be written.")
            self.failed = True
            return
        self.metrics, self.failed = [], False

    def _write_all(self, path: Path) -> None:
        """Write the file anew, with the columns of all rows."""
        earlier: list[dict[str, Any]] = []
        if path.is_file():
            with path.open(newline="") as file:
                earlier = list(csv.DictReader(file))
        write_csv(path, self.metrics_keys, [*earlier, *self.metrics])


def _append(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """Add rows to a table; a disk that is full midway leaves it as it was."""
    size = path.stat().st_size
    try:
        with path.open("a", newline="") as file:
            csv.DictWriter(file, columns).writerows(rows)
    except OSError:
        os.truncate(path, size)
        raise


def survive_full_disks(loggers: Iterable[Any]) -> None:
    """Let Lightning's CSV loggers write as `CarefulWriter` does, once they have started."""
    for logger in loggers:
        if isinstance(logger, CSVLogger) and type(logger.experiment) is ExperimentWriter:
            logger.experiment.__class__ = CarefulWriter


def log_figure(trainer: L.Trainer, name: str, path: Path) -> None:
    """Show an image file at the present meta-iteration in every logger that takes images: W&B's and TensorBoard's.

    For the first process alone.
    """
    for logger in trainer.loggers:
        if isinstance(logger, LightningWandbLogger):
            with surviving("log images", set()):
                logger.log_image(name, [str(path)], step=trainer.global_step)
        elif isinstance(logger, TensorBoardLogger):
            with Image.open(path) as image:
                pixels = np.asarray(image.convert("RGB"))
            logger.experiment.add_image(name, pixels, trainer.global_step, dataformats="HWC")


def _reason(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0].rstrip('.')}" if text else type(error).__name__
