"""The evaluation half of a learner: tasks are adapted to, predicted and measured, and the means are logged."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fomal.engine.chunking import Chunks
from fomal.evaluation.figures import Quantity, reported
from fomal.evaluation.metrics import Metric, check_metrics
from fomal.evaluation.protocols import ClassificationResult, RegressionResult, evaluate, in_order, metrics_of
from fomal.evaluation.tally import Tally
from fomal.learner.adapting import Adapting
from fomal.learner.settings import EvalSchedule
from fomal.tasks.episode import Episode, refuse_others
from fomal.utils.pytree import Data


class Evaluating(Adapting):
    """A module that evaluates an initialisation.

    Attributes:
        results: what the last evaluation found: figures, their units and directions, the number of tasks.
        metrics: what is measured; None: what the loss says.
    """

    results: dict[str, Any]
    metrics: list[Metric] | None
    _tally: Tally | None  # it begins with each evaluation, and is nothing to be saved

    def metrics_for(self, y: Data) -> list[Metric]:
        """The metrics of targets y (T, Q, *target): those given, or the loss's own."""
        if self.metrics is None:
            return metrics_of(self.objective.for_queries().loss_of(y), y)
        check_metrics(self.metrics)  # they may have been put in the place of others
        return self.metrics

    def evaluate(self, episode: Episode) -> ClassificationResult | RegressionResult:
        """Adapt to the support sets, predict the query sets and measure; changes neither weights nor carried state."""
        refuse_others(episode)
        if episode.device.type == "cpu":
            episode.refuse_nonfinite()
        if not episode.query_examples:
            raise ValueError("Episode.query_x has no examples: an evaluation needs one at least.")
        groups = episode.by_size()
        return in_order([self._evaluate(group) for _, group in groups], [places for places, _ in groups])

    def _evaluate(self, episode: Episode) -> ClassificationResult | RegressionResult:
        """Evaluate tasks of one size."""
        inner, schedule = self.inner_loop(episode, training=False), self.eval_schedule
        report = schedule.report_steps if isinstance(schedule, EvalSchedule) else None
        return evaluate(inner, self.initialisation(), self.chunks, self.metrics_for(episode.query_y), report)

    def validation_step(self, batch: Episode, batch_idx: int) -> None:
        """Evaluate a batch of tasks."""
        if self._tally is None:
            self._tally = Tally(self.device)
        self._tally.add(batch.number, self.evaluate(batch), self.metrics_for(batch.query_y), batch.weight)

    def test_step(self, batch: Episode, batch_idx: int) -> None:
        """Evaluate a batch of tasks."""
        self.validation_step(batch, batch_idx)

    def predict_step(self, batch: Episode, batch_idx: int) -> dict[str, Any]:
        """The predictions for a batch of tasks, with episode numbers, true targets and, where they differ, sizes."""
        result = self.evaluate(batch)
        sizes = {} if batch.query_size is None else {"query_size": batch.query_size}
        return {"number": batch.number, "query_y": batch.query_y, **sizes, **result._asdict()}

    def on_validation_epoch_end(self) -> None:
        """Log the validation figures."""
        self.log_dict(self.evaluation_figures("val") | {"step": float(self.global_step)})

    def on_test_epoch_end(self) -> None:
        """Log the test figures."""
        self.log_dict(self.evaluation_figures("test"))

    def evaluation_figures(self, stage: str) -> dict[str, Tensor]:
        """The figures of the evaluated tasks, which are forgotten then; `results` has it too."""
        tally, self._tally = self._tally or Tally(self.device), None
        figures, self.results = tally.finish(stage)
        return figures

    def try_metrics(self, episode: Episode) -> dict[str, Quantity]:
        """Measure the first of some tasks before adaptation, where nothing else happens.

        Returns:
            The figures that an evaluation of such tasks may give, by their names.

        Raises:
            ValueError: a metric does not fit, in its words.
        """
        (_, episode), *_ = episode.by_size()
        inner, metrics = self.inner_loop(episode, training=False).sample(0), self.metrics_for(episode.query_y)
        with torch.random.fork_rng(devices=[]):
            result = evaluate(inner, self.initialisation(), Chunks(1), metrics)
        return {figure.name: figure for figure in reported(metrics, isinstance(result, ClassificationResult), True)}
