"""Values that are not finite: nothing is published, tested or kept silent about."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from fomal.callbacks import SaveLast
from fomal.data import SinusoidDataModule
from fomal.evaluation import Accuracy, TaskMetric, protocols
from fomal.evaluation.metrics import Predicted
from fomal.inner.loop import InnerLoop
from fomal.learner.meta_learner import MetaLearner
from fomal.utils.tree import Tree
from tests.helpers.learners import Blobs, blob_learner, sine_learner, trainer


def first(learner: MetaLearner) -> torch.Tensor:
    return next(learner.network.parameters()).data


class Spoil(Callback):
    """Makes something not finite after a meta-iteration."""

    def __init__(self, step: int, what: str) -> None:
        self.step, self.what = step, what

    def on_train_batch_end(self, trainer: Any, learner: Any, *args: Any) -> None:
        if trainer.global_step != self.step:
            return
        (optimizer,) = trainer.optimizers
        if self.what == "weights":
            first(learner)[0] = torch.inf
        elif self.what == "state":
            next(iter(optimizer.state.values()))["exp_avg_sq"][0] = torch.inf
        elif self.what == "lr":
            optimizer.param_groups[0]["lr"] = float("nan")
        else:
            learner.carried["second_moment"][next(iter(learner.carried["second_moment"]))][0] = torch.nan


MESSAGES = {
    "weights": r"the network's \S+weight is infinite or NaN, so training has diverged",
    "state": r"outer optimiser's exp_avg_sq of parameter 0 is infinite or NaN, so no checkpoint is written",
    "lr": "the outer step size is infinite or NaN, so no checkpoint is written",
    "carried": r"the carried second_moment of \S+ is infinite or NaN, so no checkpoint is written",
}


@pytest.mark.parametrize("what", MESSAGES)
@pytest.mark.parametrize("saver", ["SaveLast", "ModelCheckpoint"])
def test_no_checkpoint_is_replaced_by_one_that_is_not_finite(what: str, saver: str, tmp_path: Path) -> None:
    learner = sine_learner(outer={"optimizer": lambda p: torch.optim.Adam(p, lr=0.01)})
    saves = {
        "SaveLast": SaveLast(2, str(tmp_path)),
        "ModelCheckpoint": ModelCheckpoint(
            tmp_path, every_n_train_steps=2, filename="last", enable_version_counter=False
        ),
    }
    run = trainer(8, callbacks=[Spoil(6, what), saves[saver]], enable_checkpointing=True)
    with pytest.raises(FloatingPointError, match=f"meta-iteration 6: .*{MESSAGES[what]}"):
        run.fit(learner, datamodule=SinusoidDataModule())
    kept = {path.name: torch.load(path, weights_only=True)["global_step"] for path in tmp_path.glob("*.ckpt")}
    assert kept == ({"last.ckpt": 4, "previous.ckpt": 2} if saver == "SaveLast" else {"last.ckpt": 4})


@pytest.mark.parametrize("on_nonfinite", ["raise", "skip_task"])
def test_an_outer_step_that_is_too_large_is_told_from_tasks_that_diverge(on_nonfinite: str) -> None:
    learner = sine_learner(outer={"on_nonfinite": on_nonfinite})
    with pytest.raises(FloatingPointError, match="^meta-iteration 1: the network's .* is infinite or NaN"):
        trainer(9, callbacks=[Spoil(1, "weights")]).fit(learner, datamodule=SinusoidDataModule())


def broken(split: str, numbers: range) -> type[SinusoidDataModule]:
    class Broken(SinusoidDataModule):
        """Some of its training tasks have targets that are not finite, or others whose loss is not."""

        def episodes(self, asked: str, number: torch.Tensor) -> Any:
            episode = super().episodes(asked, number)
            bad = torch.tensor([asked == split and n in numbers for n in number.tolist()])
            y = episode.query_y if split != "train" else episode.support_y
            y = y.where(~bad[:, None, None], torch.nan if split == "train" else 1e30)
            return episode._replace(**{"query_y" if split != "train" else "support_y": y})

    return Broken


def test_meta_batches_that_are_left_out_whole_are_said_and_end_the_run(recwarn: pytest.WarningsRecorder) -> None:
    data = broken("train", range(6, 10**6))(meta_batch_size=2, train_shots=5)
    learner = sine_learner(outer={"on_nonfinite": "skip_task"})
    run = trainer(500)
    with pytest.raises(FloatingPointError, match="^meta-iteration 103: no task of the last 100 meta-batches is finite"):
        run.fit(learner, datamodule=data)
    said = [str(w.message) for w in recwarn if "no task of its meta-batch" in str(w.message)]
    assert len(said) == 1
    assert said[0].startswith("meta-iteration 4: no task of its meta-batch is finite, so the weights stay as they are")


def test_one_meta_batch_that_is_left_out_does_not_end_a_run() -> None:
    data = broken("train", range(6, 8))(meta_batch_size=2, train_shots=5)
    learner, run = sine_learner(outer={"on_nonfinite": "skip_task"}), trainer(6)
    with pytest.warns(UserWarning, match="meta-iteration 4: no task of its meta-batch is finite"):
        run.fit(learner, datamodule=data)
    assert (run.global_step, learner.skipped_tasks) == (6, 2)


def test_a_test_task_that_is_not_finite_is_named() -> None:
    data = broken("test", range(3, 5))(test_tasks=7, eval_tasks_per_batch=2)
    learner = sine_learner()
    with pytest.warns(UserWarning, match="^test: the predictions, loss or distance of task 3, 4 are not finite"):
        trainer().test(learner, datamodule=data, verbose=False)
    assert learner.results["nonfinite_tasks"] == [3, 4]
    assert not torch.tensor(learner.results["metrics"]["test/loss"]).isfinite()
    trainer().validate(learner, datamodule=data, verbose=False)
    assert "nonfinite_tasks" not in learner.results


def test_outputs_that_are_nan_are_no_predictions(monkeypatch: pytest.MonkeyPatch) -> None:
    learner, data = blob_learner(), Blobs(test_tasks=4, eval_tasks_per_batch=2)
    inductive = protocols._inductive

    def spoilt(inner: InnerLoop, params: Tree) -> Predicted:
        predicted, bad = inductive(inner, params), (inner.episode.number == 2)[:, None, None]
        return Predicted(predicted.y, lambda: predicted.prediction.where(~bad, torch.nan), lambda: predicted.losses)

    monkeypatch.setattr(protocols, "_inductive", spoilt)
    with pytest.warns(UserWarning, match="of task 2 are not finite, nor are the means: lower model.inner_optimizer.lr"):
        trainer().test(learner, datamodule=data, verbose=False)
    assert torch.tensor(learner.results["metrics"]["test/accuracy"]).isnan()


class OfMost(TaskMetric):
    """Undefined where the first query of a task is taken for the first class."""

    name, higher_is_better = "most", True

    def __call__(self, prediction: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.tensor(torch.nan) if prediction[0].argmax() == 0 else torch.tensor(1.0)


def test_a_metric_that_is_nan_for_a_task_is_named() -> None:
    data = Blobs(test_tasks=9, eval_tasks_per_batch=4)
    learner = blob_learner(metrics=[Accuracy(), OfMost()])
    with pytest.warns(UserWarning, match="^test: the predictions, accuracy, most or distance of task"):
        trainer().test(learner, datamodule=data, verbose=False)
    learner.trainer = None
    result = learner.evaluate(data.on_after_batch_transfer(data.episodes("test", torch.arange(9)), 0))
    undefined = result.figures["most"].isnan().flatten(1).any(1)
    assert 0 < undefined.sum() < 9
    assert learner.results["nonfinite_tasks"] == undefined.nonzero().flatten().tolist()
    assert torch.tensor(learner.results["metrics"]["test/accuracy"]).isfinite()


@pytest.mark.parametrize("verb", ["fit", "validate", "test", "predict"])
def test_weights_that_are_not_finite_are_refused_by_name(verb: str) -> None:
    learner = sine_learner()
    first(learner)[0] = torch.nan
    name = re.escape(next(name for name, _ in learner.network.named_parameters()))
    with pytest.raises(FloatingPointError, match=f"^{verb}: the network's {name} is infinite or NaN"):
        getattr(trainer(), verb)(learner, datamodule=SinusoidDataModule())
