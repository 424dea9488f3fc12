"""Metrics of torchmetrics."""

from __future__ import annotations

import inspect
from importlib import import_module
from typing import Any

import torchmetrics
from torch import Tensor

from fomal.evaluation.metrics import TaskMetric, refuse_several
from fomal.evaluation.metrics_of_labels import refuse_numbers
from fomal.utils.checks import first_line


class TorchMetric(TaskMetric):
    """A metric of torchmetrics, computed for each task by itself.

    Those of `torchmetrics.classification` get, of int64 labels, the probabilities of all labels (N, C) and the labels
    (N,), an example's many labels one after the other, and `num_classes` is C where it is not given; `Binary...` ones
    get the probability of the second of two classes. Of targets that are 0 or 1 they get both shaped as the targets.
    Others get predictions and targets (Q, *target) as they are. Values have torchmetrics' own precision, mostly 32
    bits.

    Args:
        metric: its class path, e.g. "torchmetrics.classification.MulticlassAUROC".
        name: what the figure is called.
        unit: see `Metric`.
        settings: its arguments.
        logits: predictions are logits, of which `torchmetrics.classification` gets softmax, or sigmoid of targets that
            are 0 or 1; if not, they are probabilities.
        higher_is_better: the direction; null: as torchmetrics says.

    Raises:
        ValueError: there is no such metric of torchmetrics, or it does not take the settings; at first use, for
            predictions and targets that it is not for.
    """

    def __init__(
        self,
        metric: str,
        name: str,
        unit: str = "",
        settings: dict[str, Any] | None = None,
        logits: bool = True,
        higher_is_better: bool | None = None,
    ) -> None:
        self.kind = _imported(metric)
        self.name, self.unit, self.settings, self.logits = name, unit, dict(settings or {}), logits
        said = self.kind.higher_is_better
        self.higher_is_better = said if higher_is_better is None else higher_is_better
        module = self.kind.__module__
        self.classifies = module.startswith("torchmetrics.classification.")
        self.is_binary = self.classifies and self.kind.__name__.startswith("Binary")
        self._make(2)

    def __call__(self, prediction: Tensor, y: Tensor) -> Tensor:
        """See `TaskMetric`."""
        if self.classifies and y.is_floating_point():
            prediction, y = (prediction.sigmoid() if self.logits else prediction), y.long()
        elif self.classifies:
            prediction, y = prediction.flatten(0, -2), y.flatten()  # (N, C), (N,)
            prediction = prediction.softmax(-1) if self.logits else prediction
        made = self._make(prediction.shape[-1]).to(y.device)
        if self.is_binary and prediction.ndim > y.ndim:
            prediction = prediction[:, 1]
        made.update(prediction, y)
        value: Tensor = made.compute()
        return value

    def check(self, prediction: Tensor, y: Tensor) -> None:
        """See `Metric`."""
        refuse_several(self, prediction, y)
        if self.classifies and not y.is_floating_point():
            refuse_numbers(self, prediction, y)
            if self.is_binary and prediction.shape[-1] != 2:
                raise ValueError(
                    f"metric {self.name}, {self.kind.__name__}, is of two classes, but there are "
                    f"{prediction.shape[-1]}: use one whose name begins with Multiclass."
                )
        elif prediction.shape != y.shape:
            raise ValueError(
                f"metric {self.name} compares each target with its prediction, but {tuple(prediction.shape[2:])} is "
                f"predicted for targets {tuple(y.shape[2:])} of each example: use another metric, or another loss."
            )
        elif self.classifies and not ((y == 0) | (y == 1)).all():
            raise ValueError(f"metric {self.name} needs labels, or targets that are 0 or 1: use another metric.")

    def _make(self, classes: int) -> torchmetrics.Metric:
        """The metric, which does not ask other processes: each has tasks of its own."""
        takes = inspect.signature(self.kind).parameters
        sizes = {"num_classes": classes} if "num_classes" in takes and self.classifies else {}
        sizes |= {"num_labels": classes} if "num_labels" in takes and self.classifies and "task" not in takes else {}
        try:
            return self.kind(**{**sizes, **self.settings, "sync_on_compute": False})
        except Exception as error:  # of arguments: many kinds
            raise ValueError(
                f"metric {self.name}: {self.kind.__name__} does not take settings={self.settings}: {first_line(error)}"
            ) from error


def _imported(path: str) -> type[torchmetrics.Metric]:
    module, _, last = path.rpartition(".")
    try:
        kind = getattr(import_module(module), last)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"metric={path!r} of TorchMetric cannot be imported: {error}.") from error
    if not isinstance(kind, type) or not issubclass(kind, torchmetrics.Metric):
        raise ValueError(
            f"metric={path!r} of TorchMetric is no metric of torchmetrics: give the path of one, e.g. "
            f"torchmetrics.classification.MulticlassAUROC, or write a fomal.evaluation.TaskMetric."
        )
    return kind


class MacroF1(TorchMetric):
    """The mean over classes of F1 scores, 2 TP / (2 TP + FP + FN), as torchmetrics' `MulticlassF1Score`."""

    def __init__(self) -> None:
        super().__init__("torchmetrics.classification.MulticlassF1Score", "macro_f1", "%", {"average": "macro"})


class MeanIoU(TorchMetric):
    """The mean over classes of TP / (TP + FP + FN), as torchmetrics' `MulticlassJaccardIndex`.

    It is of all labels of a task's queries together, such as their pixels; classes that are neither there nor
    predicted are left out.
    """

    def __init__(self) -> None:
        super().__init__("torchmetrics.classification.MulticlassJaccardIndex", "mean_iou", "%", {"average": "macro"})


class CalibrationError(TorchMetric):
    """The expected calibration error of Naeini et al. 2015 (AAAI), as torchmetrics' `MulticlassCalibrationError`.

    The mean over a task's labels of how far the confidence in the predicted class is from the share that is right, in
    bins of equal width; of few labels it is biased upwards.

    Args:
        bins: how many.
        name: what the figure is called.
    """

    def __init__(self, bins: int = 15, name: str = "calibration_error") -> None:
        kind = "torchmetrics.classification.MulticlassCalibrationError"
        super().__init__(kind, name, "%", {"n_bins": bins, "norm": "l1"})
