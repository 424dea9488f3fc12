"""The log and the configuration of each replica, as of a run of its own."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import lightning as L
import yaml
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger

from fomal.callbacks.folder import is_trial, run_folder
from fomal.learner.replicas import Replicas, replica_folder
from fomal.loggers import survive_full_disks
from fomal.utils.files import keep_earlier, write_text


class ReplicaFiles(Callback):
    """Gives each of `Replicas` a folder `replica_0`, ... in the run's with its `config.yaml` and `metrics.csv`.

    A replica's configuration logs into its folder, so that `fomal fit --ckpt_path` on its checkpoint goes on alone.
    """

    def __init__(self) -> None:
        self.loggers: list[CSVLogger] = []

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Tell the learners their folders, and write their configurations."""
        if stage != "fit" or not isinstance(pl_module, Replicas) or is_trial(trainer):
            return
        folder = run_folder(trainer)  # in every process: it broadcasts
        for place, learner in enumerate(pl_module):
            if not learner.config:  # made in Python
                continue
            settings = _trainer_settings(learner.config.get("trainer", {}), folder, place, bool(trainer.loggers))
            learner.config = learner.config | {"trainer": settings}
            if trainer.is_global_zero:
                _write_config(folder / replica_folder(place) / "config.yaml", learner.config)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Open the logs, unless the command line has, to go on with those of an interrupted run."""
        if not isinstance(pl_module, Replicas) or is_trial(trainer) or not trainer.loggers:
            return
        folder = run_folder(trainer)
        if not trainer.is_global_zero:
            return
        if not self.loggers:
            for place in range(len(pl_module.learners)):
                keep_earlier(folder / replica_folder(place) / "metrics.csv")
            self.loggers = replica_loggers(folder, len(pl_module.learners))
        survive_full_disks(self.loggers)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write what was logged in this step."""
        self._write(trainer, pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write what the validation found."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._write(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write all to disk."""
        for logger in self.loggers:
            logger.save()
        self.loggers = []

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Leave the logs as they are."""
        self.loggers = []

    def _write(self, trainer: L.Trainer, replicas: L.LightningModule) -> None:
        if not isinstance(replicas, Replicas) or not replicas.figures[0]:
            return
        for place, (logger, figures) in enumerate(zip(self.loggers, replicas.figures, strict=False)):
            if place in replicas.stopped:
                continue
            row = {name: value.item() for name, value in figures.items() if name != "step"}
            logger.log_metrics(row, step=int(figures["step"]))
            logger.save()
        replicas.figures = [{} for _ in replicas.learners]


def replica_loggers(folder: Path, replicas: int) -> list[CSVLogger]:
    """A log for each replica in its folder; a `metrics.csv` that is there is deleted at the first row."""
    return [CSVLogger(str(folder), name="", version=replica_folder(place)) for place in range(replicas)]


def _trainer_settings(trainer: dict[str, Any], folder: Path, place: int, logs: bool) -> dict[str, Any]:
    """A trainer's settings for a replica alone: log and checkpoints are in its folder."""
    where = {"save_dir": str(folder), "name": "", "version": replica_folder(place)}
    logger = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": where}
    own = deepcopy(trainer) | {"logger": logger if logs else False}
    if not logs:
        own["default_root_dir"] = str(folder / replica_folder(place))
    for callback in own.get("callbacks") or []:
        if str(callback.get("class_path")).endswith(".SaveLast") and "init_args" in callback:
            callback["init_args"]["dirpath"] = None  # that of all
    return own


def _write_config(path: Path, config: dict[str, Any]) -> None:
    write_text(path, yaml.safe_dump(config, sort_keys=False), keep=True)
