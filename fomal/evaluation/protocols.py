"""Judge an initialisation: adapt to each task's support set, predict its query set, as Nichol et al. 2018 do."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fomal.engine.chunking import Chunks
from fomal.evaluation.metrics import Metric, Predicted, QueryLoss
from fomal.evaluation.metrics_of_labels import Accuracy, NegativeLogLikelihood
from fomal.evaluation.metrics_of_targets import MeanAbsoluteError, MeanSquaredError
from fomal.evaluation.torch_metric import CalibrationError, MacroF1, MeanIoU
from fomal.inner.loop import InnerLoop
from fomal.inner.loss import Loss, predicts_classes
from fomal.utils.pytree import Data, map_leaves
from fomal.utils.tree import Tree, distance


class ClassificationResult(NamedTuple):
    """Per-task results.

    Attributes:
        logits: (T, Q, ways), each query forwarded with the support set and nothing else; (T, Q, *places, ways) where
            an example has many labels.
        logits_transductive: likewise, all queries of a task in one forward pass.
        figures: each metric's values (T, 2, P), float64, or the loss's dtype: from `logits`, then from
            `logits_transductive`, after each of `steps`, or after the last step alone.
        distance: (T,), of the adapted parameters from the initialisation: D(phi, W_t) in section 5.2 of Nichol et
            al. 2018, Euclidean.
        steps: the inner steps that are reported, 0 for before adaptation; empty for the last alone.
    """

    logits: Tensor
    logits_transductive: Tensor
    figures: dict[str, Tensor]
    distance: Tensor
    steps: tuple[int, ...] = ()

    @property
    def accuracy(self) -> Tensor:
        """(T,), share of the queries' labels predicted right from `logits`; `NO_TARGET` is none."""
        return self.figures["accuracy"][:, 0, -1]

    @property
    def accuracy_transductive(self) -> Tensor:
        """(T,), likewise from `logits_transductive`."""
        return self.figures["accuracy"][:, 1, -1]


class RegressionResult(NamedTuple):
    """Per-task results.

    Attributes:
        predictions: (T, Q, *prediction) after the last step, all queries of a task in one forward pass; a tensor or
            nested dicts of tensors.
        figures: each metric's values (T, 1, P), float64, or the loss's dtype, after each of `steps`.
        distance: (T,), of the adapted parameters from the initialisation, Euclidean.
        steps: the inner steps that are reported, 0 for before adaptation.
    """

    predictions: Data
    figures: dict[str, Tensor]
    distance: Tensor
    steps: tuple[int, ...] = ()

    @property
    def losses(self) -> Tensor:
        """(T, P), query loss after each of `steps`: by default before the first inner step and after each."""
        return self.figures["loss"][:, 0]


Result = ClassificationResult | RegressionResult

_NAMED: dict[str, Callable[[], Metric]] = {
    "accuracy": Accuracy,
    "loss": QueryLoss,
    "nll": NegativeLogLikelihood,
    "macro_f1": MacroF1,
    "mean_iou": MeanIoU,
    "calibration_error": CalibrationError,
    "squared_error": MeanSquaredError,
    "absolute_error": MeanAbsoluteError,
}
"""Metrics by the names that `Loss.metrics` gives."""


def metrics_of(loss: Loss, y: Data) -> list[Metric]:
    """The metrics of a loss of targets y where no others are asked for.

    Raises:
        ValueError: the loss names one that is not there.
    """
    names = loss.metrics(y)
    if unknown := [name for name in names if name not in _NAMED]:
        raise ValueError(
            f"{type(loss).__name__}.metrics gives {unknown[0]!r}: use {', '.join(_NAMED)}, or model.metrics for others."
        )
    return [_NAMED[name]() for name in names]


def steps_reported(asked: Collection[int] | None, last: int, both: bool) -> tuple[int, ...]:
    """The inner steps whose figures are reported, see `EvalSchedule.report_steps`; empty for the last alone.

    Args:
        asked: by the user.
        last: the number of steps.
        both: whether it is a classification, under both protocols.
    """
    if asked is None:
        return () if both else tuple(range(last + 1))
    return tuple(sorted({step for step in asked if step < last} | {last}))


def evaluate(
    inner: InnerLoop,
    start: Tree,
    chunks: Chunks,
    metrics: Sequence[Metric] | None = None,
    report_steps: Collection[int] | None = None,
) -> Result:
    """Adapt from `start`, predict the queries and measure, in chunks of as many tasks as memory allows.

    Args:
        inner: the tasks.
        start: the initialisation.
        chunks: how many tasks at once.
        metrics: what to measure; None: what the loss says.
        report_steps: see `EvalSchedule`.

    Raises:
        ValueError: a metric does not fit.
    """
    y = inner.episode.query_y
    loss = inner.objective.for_queries().loss_of(y)
    metrics = metrics_of(loss, y) if metrics is None else metrics
    judge: Callable[..., Result] = classify if predicts_classes(loss, y) else regress
    run = partial(judge, start=start, metrics=metrics, report_steps=report_steps)
    # Nothing is kept of a step, so three of them show what all take.
    results: list[Result] = [result for result, _ in chunks.each("evaluation", inner, run, steps=3)]
    if len(results) == 1:
        return results[0]
    joined: Result = map_leaves(lambda *parts: torch.cat(parts), *results)
    return joined


def in_order(results: Sequence[Result], places: Sequence[Tensor | None]) -> Result:
    """The results of groups of tasks as one; 0 is predicted for queries that smaller tasks do not have.

    Args:
        results: of each group, with the same figures.
        places: of each group's tasks; None: there is one group alone.
    """
    first, index = results[0], [place for place in places if place is not None]
    if not index:
        return first
    order = torch.cat(index).argsort()

    def joined(*parts: Tensor) -> Tensor:
        longest = max(t.shape[1] if t.ndim > 1 else 0 for t in parts)
        whole = [F.pad(t, [0, 0] * (t.ndim - 2) + [0, longest - t.shape[1]]) if t.ndim > 1 else t for t in parts]
        return torch.cat(whole)[order]

    found: Result = map_leaves(joined, *results)
    return found


@torch.no_grad()
def classify(
    inner: InnerLoop,
    start: Tree,
    metrics: Sequence[Metric] | None = None,
    report_steps: Collection[int] | None = None,
) -> ClassificationResult:
    """Adapt from `start` and classify the queries under both protocols, in one pass over the tasks; see `evaluate`."""
    steps = steps_reported(report_steps, len(inner.indices), both=True)
    params, (inductive, transductive), figures = _judge(inner, start, (_inductive, _transductive), metrics, steps)
    return ClassificationResult(inductive.prediction, transductive.prediction, figures, distance(params, start), steps)


@torch.no_grad()
def regress(
    inner: InnerLoop,
    start: Tree,
    metrics: Sequence[Metric] | None = None,
    report_steps: Collection[int] | None = None,
) -> RegressionResult:
    """Adapt from `start` and measure at each step that is reported, all queries in one forward pass; see `evaluate`."""
    steps = steps_reported(report_steps, len(inner.indices), both=False)
    params, (transductive,), figures = _judge(inner, start, (_transductive,), metrics, steps)
    return RegressionResult(transductive.prediction, figures, distance(params, start), steps)


Protocol = Callable[[InnerLoop, Tree], Predicted]


def _inductive(inner: InnerLoop, params: Tree) -> Predicted:
    """Each query forwarded with the support set and nothing else."""
    episode, objective = inner.episode, inner.objective.for_queries()
    return Predicted(
        episode.query_y,
        lambda: objective.predict_inductive(params, episode.support_x, episode.query_x),
        lambda: objective.losses_inductive(
            params, (episode.support_x, episode.support_y), (episode.query_x, episode.query_y)
        ),
    )


def _transductive(inner: InnerLoop, params: Tree) -> Predicted:
    """All queries of a task in one forward pass."""
    episode, objective = inner.episode, inner.objective.for_queries()
    return Predicted(
        episode.query_y,
        lambda: objective.predict(params, episode.query_x, inner.support_for_queries()),
        lambda: inner.query_losses(params),
    )


def _judge(
    inner: InnerLoop,
    start: Tree,
    protocols: Sequence[Protocol],
    metrics: Sequence[Metric] | None,
    steps: Collection[int],
) -> tuple[Tree, list[Predicted], dict[str, Tensor]]:
    """Adapt, and measure under R protocols at P steps, the last one among them in any case.

    Returns:
        The adapted parameters, what is predicted from them under each protocol, and each metric's values (T, R, P).
    """
    y, last = inner.episode.query_y, len(inner.indices)
    metrics = metrics_of(inner.objective.for_queries().loss_of(y), y) if metrics is None else metrics
    values: dict[str, list[Tensor]] = {metric.name: [] for metric in metrics}

    def measure(params: Tree) -> list[Predicted]:
        each = [protocol(inner, params) for protocol in protocols]
        for metric in metrics:
            values[metric.name].append(torch.stack([metric.measure(predicted) for predicted in each], 1))
        return each

    params = inner.expand_to_tasks(start)
    predicted = measure(params) if 0 in steps or not last else []
    for number, step in enumerate(inner.steps(start), 1):
        params = step.after
        if number in steps or number == last:
            predicted = measure(params)
    return params, predicted, {name: torch.stack(parts, -1) for name, parts in values.items()}
