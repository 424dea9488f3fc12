"""Settings and callbacks of Lightning's under the learner: they hold, or the message says what to use instead."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch import callbacks
from lightning.pytorch.callbacks import Callback, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from fomal.callbacks import MetaProgressBar, SaveLast
from fomal.callbacks.folder import run_folder
from fomal.cli.run import default_callbacks
from fomal.data import SinusoidDataModule
from fomal.learner.meta_learner import MetaLearner
from fomal.outer.meta_gradient import MetaGradient
from tests.helpers.learners import sine_learner, trainer, weights
from tests.helpers.resume import same


def fit(learner: MetaLearner | None = None, **settings: Any) -> L.Trainer:
    run = trainer(**{"steps": 4, **settings})
    data = SinusoidDataModule(meta_batch_size=2, val_tasks=4, eval_tasks_per_batch=1)
    run.fit(learner or sine_learner(), datamodule=data)
    return run


REFUSED = [
    ({"gradient_clip_val": 0.5}, "trainer.gradient_clip_val=0.5 .*: use model.outer.clip_val=0.5 instead"),
    (
        {"gradient_clip_val": 2, "gradient_clip_algorithm": "value"},
        "use model.outer.clip_val=2 and model.outer.clip_algorithm=value instead",
    ),
    ({"accumulate_grad_batches": 4}, "trainer.accumulate_grad_batches=4: .* multiply data.meta_batch_size by 4"),
    (
        {"callbacks": [callbacks.GradientAccumulationScheduler({0: 2})]},
        "GradientAccumulationScheduler .*meta_batch_size",
    ),
    ({"callbacks": [callbacks.StochasticWeightAveraging(0.1)]}, "StochasticWeightAveraging .*model.outer.final: 0"),
    ({"callbacks": [callbacks.LearningRateFinder()]}, "LearningRateFinder .*--replicas"),
    ({"limit_train_batches": 0.5}, "trainer.limit_train_batches=0.5 is a share .*: give the number of meta-iterations"),
    ({"overfit_batches": 0.5}, "trainer.overfit_batches=0.5 is a share .*: give the number of meta-iterations"),
    (
        {"val_check_interval": 0.5, "check_val_every_n_epoch": 1},
        "val_check_interval=0.5 is a share of an epoch",
    ),
    ({"steps": -1, "max_epochs": 3}, "max_steps=-1 leaves the run without an end, .*max_epochs=3.*limit_train_batches"),
    (
        {"steps": -1, "callbacks": [callbacks.Timer("00:00:00:01", interval="epoch")]},
        "Timer with interval=epoch .*: use interval=step",
    ),
]


@pytest.mark.parametrize(("settings", "message"), REFUSED)
def test_what_means_nothing_to_a_meta_iteration_is_refused_before_work(
    settings: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SinusoidDataModule, "prepare_data", lambda self: pytest.fail("there was work"))
    with pytest.raises(ValueError, match=message):
        fit(**settings)


def test_a_run_without_a_validation_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        fit(check_val_every_n_epoch=1, val_check_interval=1.0)
    assert "there is no validation in this run" in caplog.text


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_the_outer_gradient_is_clipped_as_torch_clips(algorithm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, torch.Tensor]] = []
    adopt = MetaLearner.adopt

    def watched(self: MetaLearner, found: MetaGradient | None) -> None:
        assert found is not None
        seen.append(
            {name: p.detach() - 1.0 * _clipped(found.gradient)[name] for name, p in self.network.named_parameters()}
        )
        adopt(self, found)

    def _clipped(gradient: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if algorithm == "value":
            return {name: g.clamp(-0.01, 0.01) for name, g in gradient.items()}
        norm = torch.cat([g.flatten() for g in gradient.values()]).norm()
        assert norm > 0.02
        return {name: g * 0.01 / (norm + 1e-6) for name, g in gradient.items()}

    monkeypatch.setattr(MetaLearner, "adopt", watched)
    learner = sine_learner(outer={"clip_val": 0.01, "clip_algorithm": algorithm, "final": 1.0})
    fit(learner, steps=3)
    for name, expected in seen[-1].items():
        torch.testing.assert_close(weights(learner)[name], expected)


def test_a_clip_that_clips_nothing_changes_nothing() -> None:
    plain, clipped = sine_learner(), sine_learner(outer={"clip_val": 1e6})
    fit(plain)
    fit(clipped)
    same(weights(clipped), weights(plain))


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_a_clip_is_a_positive_number(value: float) -> None:
    with pytest.raises(ValueError, match=f"model.outer.clip_val={value} must be above 0 and finite"):
        sine_learner(outer={"clip_val": value})


def test_the_learning_rate_is_monitored_all_along(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name="", version="")
    fit(steps=6, logger=logger, log_every_n_steps=2, callbacks=[LearningRateMonitor()])
    with (tmp_path / "metrics.csv").open() as file:
        rates = [float(row["lr-SGD"]) for row in csv.DictReader(file) if row["lr-SGD"]]
    assert rates == pytest.approx([5 / 6, 3 / 6, 1 / 6])


def test_evaluations_take_a_share_of_their_batches() -> None:
    learner = sine_learner()
    fit(learner, limit_val_batches=0.5, val_check_interval=2)
    assert learner.results["tasks"] == 2


def test_epochs_of_limited_length_end_the_linear_schedule() -> None:
    class Rates(Callback):
        def __init__(self) -> None:
            self.seen: list[float] = []

        def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
            self.seen.append(trainer.optimizers[0].param_groups[0]["lr"])

    rates = Rates()
    fit(steps=-1, max_epochs=2, limit_train_batches=2, callbacks=[rates], val_check_interval=2)
    assert rates.seen == pytest.approx([1.0, 0.75, 0.5, 0.25])


@pytest.mark.parametrize(
    "settings",
    [
        {"log_every_n_steps": 0},
        {"val_check_interval": "00:00:01:00"},
        {"detect_anomaly": True},
        {"fast_dev_run": True},
        {"num_sanity_val_steps": 2},
        {"profiler": "simple"},
        {"limit_val_batches": 0},
    ],
)
def test_other_settings_work(settings: dict[str, Any]) -> None:
    assert fit(**settings).global_step == (1 if "fast_dev_run" in settings else 4)


@pytest.mark.parametrize("name", ["{val/loss}", "{step}-{val/loss}", "{val/loss}-{val/distance}", "{step}"])
def test_results_land_in_the_run_whatever_the_names_of_its_checkpoints(name: str, tmp_path: Path) -> None:
    learner = sine_learner()
    keep = ModelCheckpoint(filename=name, monitor="val/loss")
    logger = CSVLogger(tmp_path, name="", version="run")
    run = fit(learner, callbacks=[keep], val_check_interval=2, logger=logger, enable_checkpointing=True)
    assert Path(keep.best_model_path).is_file()
    run.state.fn = L.pytorch.trainer.states.TrainerFn.TESTING
    run._checkpoint_connector._user_managed = True
    run.ckpt_path = keep.best_model_path
    assert run_folder(run) == tmp_path / "run"


def test_a_progress_bar_of_ones_own_takes_the_place_of_ours() -> None:
    own = callbacks.TQDMProgressBar()
    assert not any(isinstance(callback, MetaProgressBar) for callback in default_callbacks({"callbacks": own}))
    chosen = default_callbacks({"callbacks": [SaveLast(7)]})
    assert sum(isinstance(callback, MetaProgressBar) for callback in chosen) == 1


def test_where_the_run_is_instead_of_the_root_folder_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from fomal.cli import main

    monkeypatch.chdir(tmp_path)
    main(["fit", "--trainer.default_root_dir=elsewhere", "--trainer.fast_dev_run=true", "--trainer.accelerator=cpu"])
    said = re.sub(r"\s+", " ", capsys.readouterr().err)
    assert "the run is in runs, as trainer.logger says, and not in trainer.default_root_dir=elsewhere: use" in said
