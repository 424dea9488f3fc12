"""Metrics of labels and logits; predictions are (T, Q, *places, C) for labels y (T, Q, *places), classes last."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fomal.evaluation.metrics import ExampleMetric, Metric, refuse_several
from fomal.tasks.episode import NO_TARGET
from fomal.utils.checks import positive


def refuse_numbers(metric: Metric, prediction: Tensor, y: Tensor) -> None:
    """Raise ValueError unless y (T, Q, *places) are labels, and predictions (T, Q, *places, C) scores of classes."""
    refuse_several(metric, prediction, y)
    if y.is_floating_point():
        raise ValueError(
            f"metric {metric.name} needs int64 labels, but the data's targets are floating point: use one of targets, "
            f"e.g. fomal.evaluation.MeanSquaredError."
        )
    if prediction.shape[:-1] != y.shape:
        raise ValueError(
            f"metric {metric.name} needs scores of classes, the last axis, for labels {tuple(y.shape[2:])} of each "
            f"example, but {tuple(prediction.shape[2:])} is predicted: use another metric, or another loss."
        )


class Accuracy(ExampleMetric):
    """The share of labels at which the prediction is largest."""

    name, unit, higher_is_better = "accuracy", "%", True

    def __call__(self, prediction: Tensor, y: Tensor) -> Tensor:
        """See `ExampleMetric`."""
        return prediction.argmax(-1) == y

    def check(self, prediction: Tensor, y: Tensor) -> None:
        """See `Metric`."""
        refuse_numbers(self, prediction, y)


class TopKAccuracy(ExampleMetric):
    """The share of labels that are among the k classes with the largest predictions; called `top5_accuracy`, say.

    Args:
        k: how many.

    Raises:
        ValueError: k is no whole number from 1; at first use, there are not more classes than that.
    """

    unit, higher_is_better = "%", True

    def __init__(self, k: int = 5) -> None:
        positive(k=k)
        self.k, self.name = k, f"top{k}_accuracy"

    def __call__(self, prediction: Tensor, y: Tensor) -> Tensor:
        """See `ExampleMetric`."""
        return (prediction.topk(self.k, -1).indices == y[..., None]).any(-1)

    def check(self, prediction: Tensor, y: Tensor) -> None:
        """See `Metric`."""
        refuse_numbers(self, prediction, y)
        if self.k >= prediction.shape[-1]:
            raise ValueError(
                f"metric {self.name} is always 100 % of {prediction.shape[-1]} classes: lower k, or leave it out."
            )


class NegativeLogLikelihood(ExampleMetric):
    """The mean of -log softmax(z)_y over labels y, z the predictions, in nats; equation 4.108 of Bishop 2006."""

    name, unit, higher_is_better = "nll", "nats", False

    def __call__(self, prediction: Tensor, y: Tensor) -> Tensor:
        """See `ExampleMetric`."""
        losses = F.cross_entropy(prediction.flatten(0, -2), y.flatten(), ignore_index=NO_TARGET, reduction="none")
        return losses.view(y.shape)

    def check(self, prediction: Tensor, y: Tensor) -> None:
        """See `Metric`."""
        refuse_numbers(self, prediction, y)
