"""Log how far the gradients of a task, and of different tasks, point the same way."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from fomal.analysis.alignment import gradient_alignment
from fomal.callbacks.folder import is_trial
from fomal.learner.meta_learner import MetaLearner
from fomal.learner.replicas import Replicas
from fomal.tasks.datamodule import EpisodeDataModule
from fomal.tasks.episode import Episode


class GradientAlignment(Callback):
    """Logs the alignment of gradients before, during and after training, always on the same validation tasks.

    `alignment/within` is the mean inner product of the gradients of two disjoint mini-batches of one task,
    `alignment/between` that of different tasks; `..._cosine` is of their directions, `..._ci95` the half-width of a
    95 % interval over tasks. Measured at the initialisation, over all trainable parameters. Rules of this package raise
    the first: that is what their AvgGradInner term does (Nichol et al. 2018, section 5.1).

    Args:
        tasks: number of validation tasks.
        tasks_at_once: how many to compute together; bounds memory.
    """

    def __init__(self, tasks: int = 50, tasks_at_once: int = 10) -> None:
        if tasks < 3 or tasks_at_once < 1:
            raise ValueError(f"tasks={tasks} must be at least 3, and tasks_at_once={tasks_at_once} at least 1.")
        self.tasks, self.tasks_at_once = tasks, tasks_at_once
        self._measured_at = -1

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Raise ValueError for replicas, before any work."""
        if isinstance(pl_module, Replicas):
            raise ValueError("GradientAlignment does not work with replicas: leave one of the two out.")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure before the first step."""
        self._measured_at = -1
        self._measure(trainer, pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure during training."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._measure(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure at the end."""
        self._measure(trainer, pl_module)

    @torch.no_grad()
    def _measure(self, trainer: L.Trainer, learner: L.LightningModule) -> None:
        data: Any = getattr(trainer, "datamodule", None)
        step = trainer.global_step
        if not isinstance(learner, MetaLearner) or not isinstance(data, EpisodeDataModule):
            raise TypeError("GradientAlignment needs a MetaLearner and an EpisodeDataModule, given as datamodule.")
        if not trainer.is_global_zero or is_trial(trainer) or step == self._measured_at:
            return
        self._measured_at = step
        was_training = learner.training
        learner.eval()  # no dropout
        with torch.random.fork_rng(devices=[]):  # a network's own noise must not move the run's
            found = gradient_alignment(learner.objective, learner.initialisation(), self._episodes(learner, data))
        learner.train(was_training)
        metrics = {f"alignment/{name}": estimate.value for name, estimate in found._asdict().items()}
        metrics |= {f"alignment/{name}_ci95": estimate.ci95 for name, estimate in found._asdict().items()}
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=step)

    def _episodes(self, learner: MetaLearner, data: EpisodeDataModule) -> Iterator[Episode]:
        dtype = next(learner.network.parameters()).dtype
        for number in torch.split(torch.arange(self.tasks), self.tasks_at_once):
            episode = data.episodes("val", number).to(learner.device)
            yield data.on_after_batch_transfer(episode, 0).floating(dtype)
