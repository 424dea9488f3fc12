"""The learner's metrics: what is measured, under which protocols, after which steps, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import Tensor, nn

from fomal.callbacks.results import print_table
from fomal.data import SinusoidDataModule
from fomal.evaluation import (
    Accuracy,
    ExampleMetric,
    MeanAbsoluteError,
    MeanIoU,
    MeanSquaredError,
    Metric,
    QueryLoss,
    TaskMean,
    TopKAccuracy,
)
from fomal.inner import SGD
from fomal.learner.meta_learner import MetaLearner
from fomal.learner.replicas import Replicas
from fomal.learner.settings import EvalSchedule, InnerSchedule
from fomal.outer import Reptile
from fomal.run.trust import is_known
from fomal.tasks.episode import NO_TARGET, Episode
from tests.helpers.learners import Blobs, blob_learner, sine_learner, trainer


def test_figures_are_means_over_tasks_of_what_evaluate_gives() -> None:
    metrics = [TopKAccuracy(2), Accuracy(), QueryLoss()]
    learner = blob_learner(metrics=metrics, eval={"report_steps": [0, 3]})
    data = Blobs(test_tasks=5, eval_tasks_per_batch=2)
    logged = trainer().test(learner, datamodule=data, verbose=False)[0]
    results = learner.results
    learner.trainer = None
    whole = learner.evaluate(data.on_after_batch_transfer(data.episodes("test", torch.arange(5)), 0))
    assert whole.steps == tuple(results["reported_steps"]) == (0, 3, 4)
    names = [f"{m.name}{p}{w}" for m in metrics for p in ("", "_transductive") for w in ("_before", "")] + ["distance"]
    assert list(results["figures"]) == [f"test/{name}" for name in names]
    assert list(results["metrics"]) == list(results["figures"]) + [f"test/{name}_ci95" for name in names]
    assert logged == pytest.approx(results["metrics"], rel=1e-6)
    for metric in metrics:
        for place, protocol in enumerate(("", "_transductive")):
            mean = TaskMean(3)
            mean.update(whole.figures[metric.name][:, place])
            expected, half = mean.compute()
            name = f"{metric.name}{protocol}"
            assert results[f"{name}_by_step"] == pytest.approx(expected.tolist(), rel=1e-5)
            assert results[f"{name}_by_step_ci95"] == pytest.approx(half.tolist(), rel=1e-5, abs=1e-9)
            assert results["metrics"][f"test/{name}_before"] == results[f"{name}_by_step"][0]
            assert results["metrics"][f"test/{name}"] == results[f"{name}_by_step"][-1]
    torch.testing.assert_close(whole.accuracy, whole.figures["accuracy"][:, 0, -1])
    assert results["figures"]["test/top2_accuracy_before"] == {
        **{"metric": "top2_accuracy", "unit": "%", "higher_is_better": True, "before": True}
    }


def test_a_regression_reports_each_step_unless_asked_otherwise() -> None:
    data = SinusoidDataModule(test_tasks=3)
    for asked, steps in ((None, [0, 1, 2, 3, 4]), ([], [4]), ([2], [2, 4])):
        learner = sine_learner(metrics=[MeanSquaredError(), QueryLoss()], eval={"report_steps": asked})
        trainer().test(learner, datamodule=data, verbose=False)
        assert learner.results["reported_steps"] == steps
        assert len(learner.results["loss_by_step"]) == len(steps)
        assert learner.results["squared_error_by_step"] == pytest.approx(learner.results["loss_by_step"], rel=1e-5)
        assert ("test/loss_before" in learner.results["metrics"]) == (0 in steps)


class Pixels(nn.Module):
    """Scores of three classes for each pixel, classes last."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).movedim(1, -1)


def test_dense_labels() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(2, 4, 1, 5, 6), torch.randint(0, 3, (2, 4, 5, 6))
    y[1, 2, :3] = NO_TARGET
    learner = MetaLearner(
        Pixels(), Reptile(), SGD(0.1), eval=EvalSchedule(2, 3), metrics=[MeanIoU(), Accuracy(), QueryLoss()]
    )
    result = learner.evaluate(Episode(x, y, x, y, torch.arange(2), 3))
    for t in range(2):
        given = y[t] != NO_TARGET
        found, truth = result.logits[t].argmax(-1)[given], y[t][given]
        each = [((found == c) & (truth == c)).sum() / ((found == c) | (truth == c)).sum() for c in range(3)]
        assert result.figures["mean_iou"][t, 0, 0].item() == pytest.approx(torch.stack(each).mean().item(), rel=1e-6)
        assert result.accuracy[t].item() == pytest.approx((found == truth).double().mean().item())
        loss = nn.functional.cross_entropy(result.logits[t][given], truth)
        assert result.figures["loss"][t, 0, 0].item() == pytest.approx(loss.item(), rel=1e-5)


class Silly(ExampleMetric):
    """A metric whose only virtue is a name."""

    name, unit, higher_is_better = "silly", "m/s²", None

    def __call__(self, prediction: Tensor, y: Tensor) -> Tensor:
        return torch.ones(prediction.shape[:2])


def test_the_table_shows_units(capsys: pytest.CaptureFixture[str]) -> None:
    learner = sine_learner(metrics=[Silly()])
    trainer().test(learner, datamodule=SinusoidDataModule(test_tasks=2), verbose=False)
    print_table(learner.results)
    assert " 1.0000 m/s² " in capsys.readouterr().out


@pytest.mark.parametrize("stage", ["fit", "validate", "test"])
def test_a_metric_of_other_targets_is_refused_before_work_starts(stage: str) -> None:
    class Untouched(L.Callback):
        def on_train_start(self, *args: Any) -> None:
            raise AssertionError

        on_validation_start = on_test_start = on_train_start

    run = trainer(callbacks=[Untouched()])
    with pytest.raises(ValueError, match="^metric absolute_error needs floating-point targets, but the data have"):
        getattr(run, stage)(blob_learner(metrics=[MeanAbsoluteError()]), datamodule=Blobs())


def test_a_run_without_validation_needs_no_metric_that_fits() -> None:
    trainer(1, limit_val_batches=0).fit(blob_learner(metrics=[MeanAbsoluteError()]), datamodule=Blobs())


def test_trying_metrics_changes_no_training() -> None:
    """Dropout draws the same numbers, whatever is measured."""
    found = []
    for metrics in ([Accuracy()], [MeanIoU(), TopKAccuracy(1), QueryLoss()]):
        network = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(81, 3))
        torch.manual_seed(3)
        network[2].reset_parameters()
        learner = blob_learner(network=network, metrics=metrics)
        torch.manual_seed(4)
        trainer(3).fit(learner, datamodule=Blobs())
        found.append((learner.network[2].weight.clone(), torch.rand(1)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("kind", [ModelCheckpoint, EarlyStopping])
def test_callbacks_that_monitor_know_the_direction(kind: Any, tmp_path: Path) -> None:
    where = {"dirpath": tmp_path} if kind is ModelCheckpoint else {}

    def fit(monitor: str, mode: str) -> None:
        callback = kind(monitor=monitor, mode=mode, **where)
        run = trainer(2, callbacks=[callback], enable_checkpointing=kind is ModelCheckpoint, val_check_interval=1)
        learner = blob_learner(metrics=[Accuracy(), QueryLoss()], eval={"report_steps": [0]})
        run.fit(learner, datamodule=Blobs(val_tasks=2))

    for monitor in ("val/accuracy", "val/accuracy_transductive", "val/accuracy_before"):
        with pytest.raises(
            ValueError, match=rf"^{kind.__name__} has monitor='{monitor}' with mode='min', but higher is"
        ):
            fit(monitor, "min")
    with pytest.raises(ValueError, match="but lower is better: give it mode: min"):
        fit("val/loss", "max")
    fit("val/accuracy", "max")
    fit("val/distance", "max")


def test_metrics_in_the_place_of_others_are_checked_too() -> None:
    learner, episode = sine_learner(metrics=[QueryLoss()]), SinusoidDataModule().episodes("test", torch.arange(2))
    learner.metrics = [MeanAbsoluteError("cm")]
    assert list(learner.evaluate(episode).figures) == ["absolute_error"]
    learner.metrics = [QueryLoss(), QueryLoss()]
    with pytest.raises(ValueError, match="^two figures of model.metrics would be called 'loss"):
        learner.evaluate(episode)


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        (7, "=7 must be a list of steps, or null"),
        ([6], r"=\[6\] has step 6, but model.eval.steps=5: leave it out, or take more steps"),
        ([True], "=True must be a whole number"),
        ([-1], "=-1 must not be negative"),
    ],
)
def test_steps_that_cannot_be_reported_are_refused(steps: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^model.eval.report_steps{message}"):
        EvalSchedule(5, report_steps=steps)


def test_replicas_have_the_same_metrics() -> None:
    def learner(*metrics: Metric) -> MetaLearner:
        return sine_learner(metrics=list(metrics))

    with pytest.raises(ValueError, match="^replica 1 has another list of metrics than replica 0"):
        Replicas([learner(QueryLoss()), learner(MeanAbsoluteError("m"))])
    assert len(Replicas([learner(MeanAbsoluteError()), learner(MeanAbsoluteError())]).learners) == 2


def test_a_schedule_of_steps_alone_is_taken_for_evaluations_too() -> None:
    learner = sine_learner(eval={"steps": 3})
    learner.eval_schedule = InnerSchedule(2, 5)
    data = SinusoidDataModule(test_tasks=2)
    trainer().test(learner, datamodule=data, verbose=False)
    assert learner.results["reported_steps"] == [0, 1, 2]


def test_names_in_checkpoints_are_trusted_where_they_are_harmless() -> None:
    assert is_known("fomal.evaluation.Accuracy")
    assert is_known("fomal.evaluation.TorchMetric")
    assert is_known("torchmetrics.classification.MulticlassAUROC")
    assert is_known("torchmetrics.regression.R2Score")
    assert not is_known("fomal.evaluation.TaskMean")
    assert not is_known("torchmetrics.image.fid.FrechetInceptionDistance")  # which downloads weights
    assert not is_known("torchmetrics.classification.import_module")
