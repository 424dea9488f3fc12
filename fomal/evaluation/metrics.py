"""Metrics of predictions: each has a name, a unit, a direction, and a value for each task."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

from fomal.tasks.episode import NO_TARGET
from fomal.utils.checks import first_line
from fomal.utils.pytree import Data, described, leaves, map_leaves


class Predicted:
    """Predictions for the query sets of T tasks under one protocol, computed when they are first asked for.

    Predictions and targets are tensors or nested dicts of tensors, here and below.

    Args:
        y: (T, Q, *target), the true targets.
        predict: gives what is predicted, (T, Q, *prediction).
        lose: gives each task's mean query loss, (T,).
    """

    def __init__(self, y: Data, predict: Callable[[], Data], lose: Callable[[], Tensor]) -> None:
        self.y, self._predict, self._lose = y, predict, lose

    @cached_property
    def prediction(self) -> Data:
        """The predictions, (T, Q, *prediction)."""
        return self._predict()

    @cached_property
    def losses(self) -> Tensor:
        """Each task's mean query loss, (T,)."""
        return self._lose()


class Metric(ABC):
    """A figure of merit of a task's predictions; see `ExampleMetric` and `TaskMetric`, which one's own are made of.

    Attributes:
        name: letters, digits and underscores: the figure is called so in logs, tables and `results.json`.
        unit: as it is shown, e.g. "m"; "%" is shown times 100, "" without a unit.
        higher_is_better: the direction; None where there is none.
    """

    name: str
    unit: str = ""
    higher_is_better: bool | None

    @abstractmethod
    def measure(self, predicted: Predicted) -> Tensor:
        """The value of each task, (T,), which changes neither predictions nor targets; NaN where one is not finite.

        Raises:
            ValueError: the metric does not fit predictions and targets, or does not return what it should.
        """

    def check(self, prediction: Data, y: Data) -> None:  # noqa: B027 # it may refuse nothing
        """Refuse predictions and targets that the metric is not for; as it is, nothing.

        Args:
            prediction: (T, Q, *prediction).
            y: (T, Q, *target), int64 labels or floating-point targets.

        Raises:
            ValueError: naming the metric, what does not fit and the remedy.
        """


class ExampleMetric(Metric):
    """A metric with a value for each example, whose mean over a task's examples is the task's value.

    What has `fomal.tasks.episode.NO_TARGET` for a label is left out.
    """

    @abstractmethod
    def __call__(self, prediction: Data, y: Data) -> Tensor:
        """The value of each example.

        Args:
            prediction: (T, Q, *prediction), float64: logits of classes, the last axis, or what the loss predicts.
            y: (T, Q, *target), int64 labels, or float64 targets.

        Returns:
            (T, Q); or, of examples with many labels or targets, a value for each of these, (T, Q, *target).
        """

    def measure(self, predicted: Predicted) -> Tensor:
        """See `Metric`."""
        prediction, y = _wide(predicted.prediction), _wide(predicted.y)
        self.check(prediction, y)
        values = _called(self, lambda: self(prediction, y), prediction, y)
        shape = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        wanted = tuple(y.shape) if isinstance(y, Tensor) else tuple(leaves(y)[0].shape[:2])
        if not isinstance(values, Tensor) or len(shape) < 2 or shape != wanted[: len(shape)]:
            either = f" or {wanted}" if len(wanted) > 2 else ""
            raise ValueError(
                f"metric {self.name} returns {shape} for {wanted[0]} tasks of {wanted[1]} examples: give {wanted[:2]}"
                f"{either}, without the mean over them."
            )
        return _or_nan(_mean(values.double(), y), prediction)


class TaskMetric(Metric):
    """A metric with one value for a task as a whole, such as an F1 score, whose examples have none of their own."""

    @abstractmethod
    def __call__(self, prediction: Data, y: Data) -> Tensor:
        """The value of one task.

        Args:
            prediction: (Q, *prediction), float64.
            y: (Q, *target), int64 labels, or float64 targets. Where some of a task's labels are `NO_TARGET`, the
                others come one after the other: (N,), with predictions (N, classes).

        Returns:
            ().
        """

    def measure(self, predicted: Predicted) -> Tensor:
        """See `Metric`."""
        prediction, y = _wide(predicted.prediction), _wide(predicted.y)
        self.check(prediction, y)
        tasks = range(len(leaves(y)[0]))
        values = [self._of_task(*map_leaves(lambda t, n=n: t[n], (prediction, y))) for n in tasks]
        return _or_nan(torch.stack(values), prediction)

    def _of_task(self, prediction: Data, y: Data) -> Tensor:
        device = leaves(y)[0].device
        if (given := _given(y)) is not None and not given.all():
            prediction, y = prediction[given], y[given]
            if not len(y):
                return torch.full((), torch.nan, dtype=torch.float64, device=device)
        value = torch.as_tensor(_called(self, lambda: self(prediction, y), prediction, y))
        if value.numel() != 1:
            raise ValueError(f"metric {self.name} returns {tuple(value.shape)} for a task: give one number, ().")
        return value.detach().to(device, torch.float64).reshape(())


def refuse_several(metric: Metric, prediction: Data, y: Data) -> None:
    """Raise ValueError where predictions or targets are several tensors, of which a metric takes one each."""
    for value, what in ((y, "the data's targets are"), (prediction, "the predictions are")):
        if not isinstance(value, Tensor):
            raise ValueError(
                f"metric {metric.name} takes one tensor, but {what} {described(value, 2)} of each example: give "
                f"model.metrics a fomal.evaluation.ExampleMetric of your own."
            )


class QueryLoss(Metric):
    """The loss of the query sets itself, the mean over a task's examples: `model.query_loss`, or `model.loss`."""

    name = "loss"
    higher_is_better = False

    def measure(self, predicted: Predicted) -> Tensor:
        """See `Metric`."""
        return predicted.losses


def check_metrics(metrics: object) -> None:
    """Refuse what is no list of metrics that can be told apart.

    Raises:
        TypeError: an entry is no metric.
        ValueError: there is none, one does not say its name, unit or direction, or two have the same name.
    """
    if not isinstance(metrics, list | tuple) or not metrics:
        raise ValueError(f"model.metrics={metrics!r} must be a list of metrics, one at least; null for the loss's own.")
    names: set[str] = set()
    for metric in metrics:
        _check_metric(metric)
        reported = {f"{metric.name}{part}{when}" for part in ("", "_transductive") for when in ("", "_before")}
        if names & reported or "distance" in reported:
            raise ValueError(
                f"two figures of model.metrics would be called {min(names & reported or {'distance'})!r}: give "
                f"{type(metric).__name__} another name, e.g. by its argument or attribute `name`, or leave it out."
            )
        names |= reported


def _check_metric(metric: object) -> None:
    kind = type(metric).__name__
    if not isinstance(metric, Metric):
        what = f"{metric.__name__}, a class" if isinstance(metric, type) else f"a {kind}"
        raise TypeError(f"model.metrics has {what}: give metrics, e.g. [fomal.evaluation.Accuracy()].")
    name, unit = getattr(metric, "name", None), metric.unit
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z]\w*", name) or name.endswith(("_ci95", "_by_step")):
        raise ValueError(
            f"metric {kind} has name={name!r}: give letters, digits and underscores that do not end with _ci95 or "
            f"_by_step."
        )
    if not isinstance(unit, str) or not unit.isprintable():
        raise ValueError(f'metric {name} has unit={unit!r}: give a short text, "%" for shares, or "" for none.')
    direction = getattr(metric, "higher_is_better", "missing")
    if direction is not None and not isinstance(direction, bool):
        raise ValueError(f"metric {name} has higher_is_better={direction!r}: say True, False, or None for neither.")


def _wide(value: Data) -> Data:
    return map_leaves(lambda t: t.double() if t.is_floating_point() else t, value)


def _given(y: Data) -> Tensor | None:
    """Where there are labels, shaped as y; None for targets, and for several tensors."""
    return y != NO_TARGET if isinstance(y, Tensor) and not y.is_floating_point() else None


def _called(metric: Metric, call: Callable[[], Tensor], prediction: Data, y: Data) -> Tensor:
    """Call a metric; its errors name it."""
    try:
        return call()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of users' metrics: many kinds
        raise ValueError(
            f"metric {metric.name} fails on predictions {described(prediction)} and targets {described(y)} "
            f"({first_line(error)}): change the metric, or leave it out of model.metrics."
        ) from error


def _mean(values: Tensor, y: Data) -> Tensor:
    """The mean over each task's values (T, Q, ...), as many labels as there are in y (T, Q, *target) counting: (T,)."""
    counts = _given(y)
    if counts is None:
        return values.flatten(1).mean(1)
    counts = counts.flatten(values.ndim).sum(-1) if values.ndim < counts.ndim else counts
    return (values.where(counts > 0, 0) * counts).flatten(1).sum(1) / counts.flatten(1).sum(1)


def _or_nan(values: Tensor, prediction: Data) -> Tensor:
    """Values (T,) with NaN for tasks whose predictions are not finite: the largest of NaNs is no prediction."""
    finite = torch.stack([t.isfinite().flatten(1).all(1) for t in leaves(prediction)]).all(0)
    return values.where(finite | ~values.isfinite(), torch.nan)
