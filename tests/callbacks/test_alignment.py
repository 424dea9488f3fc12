from __future__ import annotations

import csv
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from fomal.analysis.alignment import gradient_alignment
from fomal.callbacks import GradientAlignment
from fomal.data.sinusoid import SinusoidDataModule
from fomal.inner import SGD
from fomal.learner import MetaLearner
from fomal.models import MLP
from fomal.outer import Reptile
from fomal.plots.curve import read_curves


def train(folder: Path, *callbacks: L.Callback, steps: int = 6, dropout: bool = False) -> MetaLearner:
    torch.manual_seed(0)
    network = torch.nn.Sequential(MLP(hidden=(8,), out_features=4), torch.nn.Dropout(0.5), torch.nn.Linear(4, 1))
    learner = MetaLearner(network if dropout else MLP(hidden=(8,)), Reptile(), SGD(0.02), inner_steps=2)
    trainer = L.Trainer(
        max_steps=steps,
        max_epochs=-1,
        accelerator="cpu",
        logger=CSVLogger(folder, name="", version="run"),
        log_every_n_steps=2,
        check_val_every_n_epoch=None,
        val_check_interval=3,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
    )
    trainer.fit(learner, datamodule=SinusoidDataModule(train_shots=10, val_tasks=4))
    return learner


def test_alignment_is_logged_before_during_and_after_training(tmp_path: Path) -> None:
    learner = train(tmp_path, GradientAlignment(tasks=12, tasks_at_once=5), steps=7)
    rows = list(csv.DictReader((tmp_path / "run" / "metrics.csv").open()))
    logged = [row for row in rows if row["alignment/within"]]
    assert [row["step"] for row in logged] == ["0", "3", "6", "7"]
    episode = SinusoidDataModule(train_shots=10).episodes("val", torch.arange(12))
    expected = gradient_alignment(learner.objective, learner.initialisation(), [episode])
    for name, estimate in expected._asdict().items():
        assert float(logged[-1][f"alignment/{name}"]) == pytest.approx(estimate.value, rel=1e-5)
        assert float(logged[-1][f"alignment/{name}_ci95"]) == pytest.approx(estimate.ci95, rel=1e-5)
    curves = read_curves([tmp_path / "run" / "metrics.csv"])
    assert [step for step, _, _ in curves["val/loss"]] == [3, 6]  # other figures are where they were


def test_it_changes_nothing_about_the_run(tmp_path: Path) -> None:
    plain = train(tmp_path / "a", dropout=True)
    measured = train(tmp_path / "b", GradientAlignment(tasks=5), dropout=True)
    for a, b in zip(plain.network.parameters(), measured.network.parameters(), strict=True):
        assert torch.equal(a, b)


def test_what_cannot_be_measured_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="tasks=2 must be at least 3"):
        GradientAlignment(tasks=2)
