"""The value of every metric beside another computation of it, and what is refused in its words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torchmetrics.functional as TF
from torch import Tensor

from fomal.evaluation import (
    Accuracy,
    CalibrationError,
    ExampleMetric,
    MacroF1,
    MeanAbsoluteError,
    MeanIoU,
    MeanSquaredError,
    Metric,
    NegativeLogLikelihood,
    QueryLoss,
    TaskMetric,
    TopKAccuracy,
    TorchMetric,
)
from fomal.evaluation.metrics import Predicted, check_metrics
from fomal.tasks.episode import NO_TARGET

T, Q, C = 3, 7, 4
GENERATOR = torch.Generator().manual_seed(0)
LOGITS = torch.randn(T, Q, C, generator=GENERATOR)
LABELS = torch.randint(0, C, (T, Q), generator=GENERATOR)
DENSE_LOGITS = torch.randn(T, Q, 5, 6, C, generator=GENERATOR)
DENSE = torch.randint(0, C, (T, Q, 5, 6), generator=GENERATOR)
DENSE[0, :3, 2:] = NO_TARGET
OUTPUTS, TARGETS = torch.randn(2, T, Q, 2, generator=GENERATOR).unbind()


def measured(metric: Metric, prediction: Any, y: Any) -> Tensor:
    values = metric.measure(Predicted(y, lambda: prediction, lambda: torch.full((T,), 0.5)))
    assert values.dtype == torch.float64
    assert values.shape == (T,)
    return values


def by_task(function: object, prediction: Tensor, y: Tensor) -> Tensor:
    """A function of the labels that are there, of one task after the other."""
    found = []
    for own, labels in zip(prediction, y, strict=True):
        given = labels != NO_TARGET
        found.append(torch.as_tensor(function(own[given], labels[given])).double())  # type: ignore[operator]
    return torch.stack(found)


def accuracy(z: Tensor, y: Tensor) -> Tensor:
    return (z.argmax(-1) == y).double().mean()


def top2(z: Tensor, y: Tensor) -> float:
    ranks = (z > z.gather(1, y[:, None])).sum(1)
    return (ranks < 2).double().mean().item()


def nll(z: Tensor, y: Tensor) -> Tensor:
    return -z.double().log_softmax(-1)[torch.arange(len(y)), y].mean()


def counts(z: Tensor, y: Tensor) -> list[tuple[float, float, float]]:
    """True positives, false positives and false negatives of each class."""
    found = z.argmax(-1)
    return [(((found == c) & (y == c)).sum().item(), ((found == c) & (y != c)).sum().item(),
             ((found != c) & (y == c)).sum().item()) for c in range(C)]  # fmt: skip


def f1(z: Tensor, y: Tensor) -> float:
    there = [(tp, fp, fn) for tp, fp, fn in counts(z, y) if tp + fp + fn]
    return sum(2 * tp / (2 * tp + fp + fn) for tp, fp, fn in there) / len(there)


def iou(z: Tensor, y: Tensor) -> float:
    there = [(tp, fp, fn) for tp, fp, fn in counts(z, y) if tp + fp + fn]
    return sum(tp / (tp + fp + fn) for tp, fp, fn in there) / len(there)


def calibration(z: Tensor, y: Tensor) -> float:
    confidence, found = z.softmax(-1).max(-1)
    right, error = (found == y).double(), 0.0
    for low in range(15):
        inside = (confidence > low / 15) & (confidence <= (low + 1) / 15)
        if inside.any():
            error += inside.double().mean().item() * abs((right[inside].mean() - confidence[inside].mean()).item())
    return error


OF_LABELS = {
    "accuracy": (Accuracy(), accuracy, "%", True),
    "top2_accuracy": (TopKAccuracy(2), top2, "%", True),
    "nll": (NegativeLogLikelihood(), nll, "nats", False),
    "macro_f1": (MacroF1(), f1, "%", True),
    "mean_iou": (MeanIoU(), iou, "%", True),
    "calibration_error": (CalibrationError(), calibration, "%", False),
}


@pytest.mark.parametrize("name", OF_LABELS)
@pytest.mark.parametrize(("z", "y"), [(LOGITS, LABELS), (DENSE_LOGITS, DENSE)], ids=["one label", "many"])
def test_metrics_of_labels_are_those_by_hand(name: str, z: Tensor, y: Tensor) -> None:
    metric, by_hand, unit, higher = OF_LABELS[name]
    assert (metric.name, metric.unit, metric.higher_is_better) == (name, unit, higher)
    torch.testing.assert_close(measured(metric, z, y), by_task(by_hand, z, y), rtol=1e-6, atol=1e-6)
    some = LABELS.where(torch.arange(Q) < 5, NO_TARGET)
    torch.testing.assert_close(measured(metric, LOGITS, some), by_task(by_hand, LOGITS, some), rtol=1e-6, atol=1e-6)


def test_they_are_those_of_torchmetrics() -> None:
    for metric, theirs in (
        (Accuracy(), lambda z, y: TF.classification.multiclass_accuracy(z, y, C, average="micro")),
        (TopKAccuracy(2), lambda z, y: TF.classification.multiclass_accuracy(z, y, C, average="micro", top_k=2)),
        (MacroF1(), lambda z, y: TF.classification.multiclass_f1_score(z, y, C)),
    ):
        torch.testing.assert_close(
            measured(metric, LOGITS, LABELS), by_task(theirs, LOGITS, LABELS), rtol=1e-6, atol=1e-6
        )


def test_metrics_of_targets_are_those_by_hand() -> None:
    for y, z in ((TARGETS, OUTPUTS), (TARGETS[..., 0], OUTPUTS[..., 0])):
        error = (z.double() - y.double()).flatten(1)
        torch.testing.assert_close(measured(MeanSquaredError("m²"), z, y), error.square().mean(1), rtol=1e-12, atol=0)
        torch.testing.assert_close(measured(MeanAbsoluteError(), z, y), error.abs().mean(1), rtol=1e-12, atol=0)
    assert (MeanSquaredError("m²").unit, MeanAbsoluteError("m").unit) == ("m²", "m")
    loss = Predicted(TARGETS, lambda: OUTPUTS, lambda: torch.tensor([1.0, 2.0, 3.0]))
    assert QueryLoss().measure(loss).tolist() == [1, 2, 3]


@pytest.mark.parametrize("logits", [True, False])
def test_a_metric_of_torchmetrics_by_its_path(logits: bool) -> None:
    auroc = TorchMetric("torchmetrics.classification.MulticlassAUROC", "auroc", "%", logits=logits)
    z = LOGITS if logits else LOGITS.softmax(-1)
    y = torch.arange(Q).remainder(C).expand(T, Q)
    expected = [TF.classification.multiclass_auroc(own.softmax(-1) if logits else own, y[0], C) for own in z]
    torch.testing.assert_close(measured(auroc, z, y), torch.stack(expected).double(), rtol=1e-6, atol=1e-6)
    assert auroc.higher_is_better is True
    several = (TARGETS > 0).float()  # (T, Q, 2)
    f1 = TorchMetric("torchmetrics.classification.MultilabelF1Score", "f1", logits=logits)
    small = OUTPUTS.sigmoid()  # which could be probabilities, or logits that are all above 0
    expected = []
    for t in range(T):
        found = torch.ones_like(several[t]) if logits else (small[t] > 0.5).float()
        tp, wrong = (found * several[t]).sum(0), (found != several[t]).sum(0)
        expected.append((2 * tp / (2 * tp + wrong)).mean().double())
    torch.testing.assert_close(measured(f1, small, several), torch.stack(expected), rtol=1e-6, atol=1e-6)
    r2 = TorchMetric("torchmetrics.regression.R2Score", "r2")
    residual = (OUTPUTS - TARGETS).square().sum(1) / (TARGETS - TARGETS.mean(1, keepdim=True)).square().sum(1)
    torch.testing.assert_close(measured(r2, OUTPUTS, TARGETS), (1 - residual).mean(1).double(), rtol=1e-5, atol=1e-5)


def test_a_binary_metric_of_two_classes_is_of_the_second() -> None:
    auroc = TorchMetric("torchmetrics.classification.BinaryAUROC", "auroc")
    y = torch.arange(Q).remainder(2).expand(T, Q)
    for t, value in enumerate(measured(auroc, LOGITS[..., :2], y)):
        score = LOGITS[t, :, 1] - LOGITS[t, :, 0]
        pairs = score[y[t] == 1][:, None] - score[y[t] == 0]
        assert value.item() == pytest.approx((pairs > 0).double().mean().item())
    with pytest.raises(ValueError, match="^metric auroc, BinaryAUROC, is of two classes, but there are 4: use"):
        measured(auroc, LOGITS, LABELS)


class Wrong(ExampleMetric):
    """Returns what it is told to."""

    name, higher_is_better = "wrong", True

    def __init__(self, shape: Sequence[int]) -> None:
        self.shape = shape

    def __call__(self, prediction: Tensor, y: Tensor) -> Tensor:
        return torch.ones(tuple(self.shape))


class WrongOfTask(TaskMetric):
    """Returns two numbers."""

    name, higher_is_better = "wrong", True

    def __call__(self, prediction: Tensor, y: Tensor) -> Tensor:
        return torch.ones(2)


@pytest.mark.parametrize("shape", [(), (T,), (T, 1), (Q, T), (T, Q, 1)])
def test_a_wrong_shape_is_refused_by_the_metrics_name(shape: Sequence[int]) -> None:
    with pytest.raises(ValueError, match=r"^metric wrong returns .* for 3 tasks of 7 examples: give \(3, 7\), without"):
        measured(Wrong(shape), LOGITS, LABELS)


def test_values_may_be_of_examples_or_of_their_labels() -> None:
    assert measured(Wrong((T, Q)), DENSE_LOGITS, DENSE).tolist() == [1, 1, 1]
    assert measured(Wrong((T, Q, 5, 6)), DENSE_LOGITS, DENSE).tolist() == [1, 1, 1]
    with pytest.raises(ValueError, match=r"^metric wrong returns \(2,\) for a task: give one number"):
        measured(WrongOfTask(), LOGITS, LABELS)


def test_an_example_counts_as_often_as_it_has_labels() -> None:
    class Ramp(Wrong):
        def __call__(self, prediction: Tensor, y: Tensor) -> Tensor:
            return torch.arange(float(Q)).expand(T, Q)

    weights = (DENSE != NO_TARGET).flatten(2).sum(-1).double()
    expected = (weights * torch.arange(Q)).sum(1) / weights.sum(1)
    torch.testing.assert_close(measured(Ramp(()), DENSE_LOGITS, DENSE), expected)
    none = LABELS.where(torch.tensor([True, True, False])[:, None], NO_TARGET)
    assert measured(Accuracy(), LOGITS, none).isnan().tolist() == [False, False, True]
    assert measured(MacroF1(), LOGITS, none).isnan().tolist() == [False, False, True]


class OfBoth(ExampleMetric):
    """Of two outputs and two targets in dicts."""

    name, higher_is_better = "both", False

    def __call__(self, prediction: Any, y: Any) -> Tensor:
        return (prediction["a"] - y["a"]).abs().mean(-1) + (prediction["b"]["c"] != y["b"]["c"])


class OfBothAtOnce(OfBoth, TaskMetric):  # type: ignore[misc] # of a task
    """The same of a whole task."""

    measure = TaskMetric.measure

    def __call__(self, prediction: Any, y: Any) -> Tensor:
        return super().__call__(prediction, y).mean()


def test_predictions_and_targets_may_be_dicts() -> None:
    z, y = {"a": OUTPUTS, "b": {"c": LABELS.flip(1)}}, {"b": {"c": LABELS}, "a": TARGETS}
    expected = (OUTPUTS - TARGETS).double().abs().mean((1, 2)) + (LABELS.flip(1) != LABELS).double().mean(1)
    for metric in (OfBoth(), OfBothAtOnce()):
        torch.testing.assert_close(measured(metric, z, y), expected)
    for metric in (Accuracy(), MeanSquaredError(), MacroF1()):
        with pytest.raises(
            ValueError, match=rf"^metric {metric.name} takes one tensor, but the data's targets are \{{'b'"
        ):
            measured(metric, z, y)
    with pytest.raises(ValueError, match=r"^metric accuracy takes one tensor, but the predictions are \{'a'"):
        measured(Accuracy(), z, LABELS)


@pytest.mark.parametrize("metric", [Accuracy(), MacroF1(), NegativeLogLikelihood()])
def test_predictions_that_are_not_finite_have_no_value(metric: Metric) -> None:
    spoilt = LOGITS.clone()
    spoilt[1, 2, 0] = torch.nan
    values = measured(metric, spoilt, LABELS)
    assert values.isnan().tolist() == [False, True, False]


NUMBERS = "^metric {} needs int64 labels, but the data's targets are floating point: use one of targets"
TARGETS_NEEDED = "^metric {} needs floating-point targets, but the data have torch.int64 labels: use one of labels"


@pytest.mark.parametrize(
    ("metric", "z", "y", "message"),
    [
        *((one, OUTPUTS, TARGETS, NUMBERS.format(name)) for name, (one, *_) in list(OF_LABELS.items())[:3]),
        (MeanSquaredError(), LOGITS, LABELS, TARGETS_NEEDED.format("squared_error")),
        (MeanAbsoluteError(), LOGITS, LABELS, TARGETS_NEEDED.format("absolute_error")),
        (MacroF1(), OUTPUTS, TARGETS, "^metric macro_f1 needs labels, or targets that are 0 or 1: use another metric"),
        (
            MeanSquaredError(),
            OUTPUTS[..., :1],
            TARGETS,
            r"^metric squared_error .* but \(1,\) is predicted for",
        ),
        (Accuracy(), OUTPUTS[..., 0], LABELS, r"^metric accuracy needs scores of classes, the last axis.*\(\) is pred"),
        (TopKAccuracy(4), LOGITS, LABELS, "^metric top4_accuracy is always 100 % of 4 classes: lower k"),
        (
            TorchMetric("torchmetrics.regression.R2Score", "r2"),
            OUTPUTS[:, :1],
            TARGETS[:, :1],
            r"^metric r2 fails on predictions \(1, 2\) of torch.float64 and targets \(1, 2\) .* \(Needs at least two",
        ),
    ],
)
def test_what_a_metric_is_not_for_is_refused_in_its_words(metric: Metric, z: Tensor, y: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        measured(metric, z, y)


class Plain(Wrong):
    """A metric of which attributes are changed."""

    def __init__(self, **attributes: object) -> None:
        for name, value in attributes.items():
            setattr(self, name, value)


class NoDirection(ExampleMetric):
    """Does not say which is better."""

    name = "some"

    def __call__(self, prediction: Tensor, y: Tensor) -> Tensor:
        return y


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        ([], r"^model.metrics=\[\] must be a list of metrics, one at least; null for the loss's own"),
        (Accuracy(), "must be a list of metrics"),
        (
            [Accuracy(), TopKAccuracy(1), Accuracy()],
            "^two figures of model.metrics would be called 'accuracy': give",
        ),
        ([Accuracy(), Plain(name="accuracy_transductive")], "would be called 'accuracy_transductive"),
        ([Plain(name="distance")], "would be called 'distance'"),
        ([Plain(name="a/b")], "^metric Plain has name='a/b': give letters, digits and underscores"),
        ([Plain(name="loss_ci95")], "name='loss_ci95'"),
        ([Plain(unit="m\n")], r"^metric wrong has unit='m\\n': give a short text"),
        ([Plain(higher_is_better=1)], "^metric wrong has higher_is_better=1: say True, False, or None for neither"),
        ([NoDirection()], "^metric some has higher_is_better='missing': say True"),
    ],
)
def test_metrics_that_cannot_be_told_apart_are_refused(metrics: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_metrics(metrics)


def test_what_is_no_metric_is_refused() -> None:
    with pytest.raises(TypeError, match=r"^model.metrics has Accuracy, a class: give metrics"):
        check_metrics([Accuracy])
    with pytest.raises(TypeError, match=r"^model.metrics has a str: give metrics"):
        check_metrics(["accuracy"])
    for path, message in (
        ("torchmetrics.classification.NoSuch", "cannot be imported"),
        ("collections.OrderedDict", "is no metric of torchmetrics"),
        ("nothing", "cannot be imported"),
    ):
        with pytest.raises(ValueError, match=f"^metric='{path}' of TorchMetric {message}"):
            TorchMetric(path, "x")
    with pytest.raises(ValueError, match=r"^metric x: R2Score does not take settings=\{'nothing': 1\}: "):
        TorchMetric("torchmetrics.regression.R2Score", "x", settings={"nothing": 1})
