"""Metrics of floating-point targets; predictions and targets are (T, Q, *target)."""

from __future__ import annotations

from torch import Tensor

from fomal.evaluation.metrics import ExampleMetric, Metric, refuse_several


def refuse_labels(metric: Metric, prediction: Tensor, y: Tensor) -> None:
    """Raise ValueError unless y are floating-point targets, and predictions shaped as they."""
    refuse_several(metric, prediction, y)
    if not y.is_floating_point():
        raise ValueError(
            f"metric {metric.name} needs floating-point targets, but the data have {y.dtype} labels: use one of "
            f"labels, e.g. fomal.evaluation.Accuracy."
        )
    if prediction.shape != y.shape:
        raise ValueError(
            f"metric {metric.name} compares each target with its prediction, but {tuple(prediction.shape[2:])} is "
            f"predicted for targets {tuple(y.shape[2:])} of each example: use another metric, or another loss."
        )


class _OfTargets(ExampleMetric):
    """A metric with a value for each target.

    Args:
        unit: as it is shown, e.g. "m".
    """

    higher_is_better = False

    def __init__(self, unit: str = "") -> None:
        self.unit = unit

    def check(self, prediction: Tensor, y: Tensor) -> None:
        """See `Metric`."""
        refuse_labels(self, prediction, y)


class MeanSquaredError(_OfTargets):
    """The mean of (z - y)^2 over targets y, z the predictions.

    Args:
        unit: as it is shown, e.g. "m²": the square of the targets'.
    """

    name = "squared_error"

    def __call__(self, prediction: Tensor, y: Tensor) -> Tensor:
        """See `ExampleMetric`."""
        return (prediction - y).square()


class MeanAbsoluteError(_OfTargets):
    """The mean of |z - y| over targets y, z the predictions.

    Args:
        unit: as it is shown, e.g. "m": that of the targets.
    """

    name = "absolute_error"

    def __call__(self, prediction: Tensor, y: Tensor) -> Tensor:
        """See `ExampleMetric`."""
        return (prediction - y).abs()
