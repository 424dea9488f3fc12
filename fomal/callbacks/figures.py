"""Figures a training run leaves in its folder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from fomal.callbacks.folder import is_trial, run_folder
from fomal.callbacks.parts import Part, parts_of
from fomal.learner.meta_learner import MetaLearner
from fomal.loggers import log_figure
from fomal.plots.adaptation import draw_adaptation
from fomal.plots.curve import draw_curve
from fomal.tasks.episode import Episode
from fomal.utils.files import dispensable
from fomal.utils.output import rank_zero_info, rank_zero_warn

NOTHING_DRAWN = "AdaptationFigure draws regression tasks of one input and one output only: nothing drawn."


@contextmanager
def aside(trainer: L.Trainer, learner: L.LightningModule) -> Iterator[None]:
    """Evaluate as validation does, without a trace: modules' modes and random states are put back."""
    modes = {module: module.training for module in learner.modules()}
    devices = [learner.device] if learner.device.type == "cuda" else []
    learner.eval()  # no dropout
    try:
        with torch.random.fork_rng(devices=devices), torch.no_grad(), trainer.precision_plugin.val_step_context():
            yield
    finally:
        for module, training in modes.items():
            module.training = training


class AdaptationFigure(Callback):
    """After `fit` on regression tasks of one input, draws how a validation task is learnt: `adaptation.png`.

    W&B and TensorBoard show it too. Of `Replicas`, each has one in a folder of its own.

    Args:
        steps: after how many inner steps to draw the prediction; 0 is before the first.
        task: number of the validation task.

    Raises:
        ValueError: a negative step or task.
    """

    def __init__(self, steps: Sequence[int] = (0, 1, 8, 32), task: int = 0) -> None:
        if min(steps) < 0 or task < 0:
            raise ValueError(f"steps={list(steps)} and task={task} must not be negative.")
        self.steps, self.task = list(steps), task

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw, unless the data are of another kind."""
        data = getattr(trainer, "datamodule", None)
        folder = run_folder(trainer)  # in every process: it broadcasts
        if not trainer.is_global_zero or is_trial(trainer):
            return
        for part in parts_of(pl_module, data, folder):
            with dispensable("the figure of an adaptation"):
                self._draw(trainer, part)

    def _draw(self, trainer: L.Trainer, part: Part) -> None:
        learner, path = part.learner, part.folder / "adaptation.png"
        episode = part.data.episodes("val", torch.tensor([self.task])).to(learner.device)
        episode = part.data.on_after_batch_transfer(episode, 0)
        (_, episode), *_ = episode.by_size()
        tensors = isinstance(episode.query_x, Tensor) and isinstance(episode.query_y, Tensor)
        if (
            not tensors
            or not episode.is_regression
            or episode.query_x.shape[2:] != (1,)
            or episode.query_y.shape[2:] != (1,)
        ):
            rank_zero_warn(NOTHING_DRAWN)
            return
        order = episode.query_x.flatten().argsort()  # lines are drawn from left to right
        episode = episode._replace(query_x=episode.query_x[:, order], query_y=episode.query_y[:, order])
        with aside(trainer, learner):
            predictions = self._predictions(learner, episode)
        if any(len(values) != episode.query_y.numel() for values in predictions.values()):  # quantiles, say
            rank_zero_warn(NOTHING_DRAWN)
            return
        draw_adaptation(
            path,
            x=episode.query_x.flatten().tolist(),
            truth=episode.query_y.flatten().tolist(),
            support=(episode.support_x.flatten().tolist(), episode.support_y.flatten().tolist()),
            predictions=predictions,
        )
        log_figure(trainer, f"{part.prefix}adaptation", path)
        rank_zero_info(f"The adaptation to a validation task is drawn in {path}.")

    def _predictions(self, learner: MetaLearner, episode: Episode) -> dict[int, list[float]]:
        """What is predicted for the queries after each of the steps that the evaluation goes."""
        inner, phi = learner.inner_loop(episode, training=False), learner.initialisation()
        stages = [{name: p[None] for name, p in phi.items()}, *(step.after for step in inner.steps(phi))]
        x = inner.episode.query_x
        asked = [step for step in self.steps if step < len(stages)]
        return {step: learner.objective.for_queries().predict(stages[step], x).flatten().tolist() for step in asked}


class LearningCurve(Callback):
    """After `fit`, draws the validation figures of the run's `metrics.csv` over meta-iterations: `curve.png`.

    W&B and TensorBoard show it too. Of `Replicas`, each has one in a folder of its own; the run's is of their means.
    """

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw, if the run logged to CSV and was validated."""
        folder = run_folder(trainer)  # in every process: it broadcasts
        if not trainer.is_global_zero or is_trial(trainer):
            return
        parts = list(parts_of(pl_module, getattr(trainer, "datamodule", None), folder))
        figures = parts[0].learner.results.get("figures") if parts else None  # those of replicas are the same
        for own, prefix in ({folder: ""} | {part.folder: part.prefix for part in parts}).items():
            metrics, path = own / "metrics.csv", own / "curve.png"
            with dispensable("its learning curve"):
                if metrics.is_file() and draw_curve([metrics], path, figures):
                    log_figure(trainer, f"{prefix}curve", path)
                    rank_zero_info(f"The learning curve is drawn in {path}.")
