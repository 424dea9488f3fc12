"""A picture of a task and of what is predicted for it."""

from __future__ import annotations

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from fomal.callbacks.figures import aside
from fomal.callbacks.folder import is_trial, run_folder
from fomal.callbacks.parts import Part, parts_of
from fomal.evaluation.protocols import ClassificationResult
from fomal.learner.meta_learner import MetaLearner
from fomal.loggers import log_figure
from fomal.plots.episode_grid import draw_episode, is_image
from fomal.tasks.datamodule import EpisodeDataModule
from fomal.tasks.episode import Episode
from fomal.utils.checks import countable, positive
from fomal.utils.files import dispensable
from fomal.utils.output import rank_zero_info


class EpisodeGrid(Callback):
    """After `fit` on images, draws a validation task, support, queries and predictions: `episode.png`.

    W&B and TensorBoard show it too. Of `Replicas`, each has one in a folder of its own. Data of another kind, and runs
    without validation, are left alone.

    Args:
        task: which validation task.
        shown: at most so many support images, and so many queries, of each class.
        after_validation: also draw after each validation; the file is replaced, loggers keep every one.
    """

    def __init__(self, task: int = 0, shown: int = 5, after_validation: bool = False) -> None:
        countable(task=task)
        positive(shown=shown)
        self.task, self.shown, self.after_validation = task, shown, after_validation
        self._drawn_at = -1

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Forget an earlier run."""
        self._drawn_at = -1

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw, if that is wanted."""
        if self.after_validation and trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._draw(trainer, pl_module)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw."""
        self._draw(trainer, pl_module)

    def _draw(self, trainer: L.Trainer, learner: L.LightningModule) -> None:
        folder = run_folder(trainer)  # in every process: it broadcasts
        step = trainer.global_step
        if not trainer.is_global_zero or is_trial(trainer) or step == self._drawn_at:
            return
        if any(name.startswith("val/") for name in trainer.callback_metrics):
            for part in parts_of(learner, getattr(trainer, "datamodule", None), folder):
                with dispensable("a picture of a validation task"):
                    self._draw_part(trainer, part, step)

    def _draw_part(self, trainer: L.Trainer, part: Part, step: int) -> None:
        learner, data, path = part.learner, part.data, part.folder / "episode.png"
        (_, episode), *_ = data.episodes("val", torch.tensor([self.task])).by_size()
        if episode.is_regression or not is_image(episode.support_x) or not episode.query_y.numel():
            return
        logits = self._logits(trainer, learner, data, episode)
        if logits is None or logits.ndim != 2:
            return
        self._drawn_at = step
        title = f"Validation task {self.task} after {step:,} meta-iterations"
        draw_episode(path, episode, logits, title, self.shown)
        log_figure(trainer, f"{part.prefix}episode", path)
        if not trainer.validating:
            rank_zero_info(f"A validation task and its predictions are drawn in {path}.")

    def _logits(
        self, trainer: L.Trainer, learner: MetaLearner, data: EpisodeDataModule, episode: Episode
    ) -> Tensor | None:
        """The predictions (Q, ways) for the queries, each forwarded by itself; None where the loss has no classes."""
        with aside(trainer, learner):
            result = learner.evaluate(data.on_after_batch_transfer(episode.to(learner.device), 0))
        return result.logits[0] if isinstance(result, ClassificationResult) else None
