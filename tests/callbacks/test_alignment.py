from __future__ import annotations

import csv
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn

from fomal.analysis.alignment import gradient_alignment
from fomal.callbacks import GradientAlignment
from fomal.data.sinusoid import SinusoidDataModule
from fomal.inner import Adam
from fomal.learner.meta_learner import MetaLearner
from fomal.learner.settings import InnerSchedule
from fomal.models import MLP
from fomal.outer import Reptile
from fomal.plots.curve import read_curves
from tests.helpers.learners import StopAfter

TASKS = 12


class AlwaysNoisy(nn.Module):
    """Draws random numbers in evaluation too."""

    def __init__(self) -> None:
        super().__init__()
        self.net = MLP(hidden=(8,))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(self.net(x), 0.1, training=True)


def build(network: type[nn.Module] = MLP) -> MetaLearner:
    torch.manual_seed(0)
    return MetaLearner(network(), Reptile(), Adam(0.01), train=InnerSchedule(2), eval=InnerSchedule(3, 5))


def trainer(folder: Path, *callbacks: L.Callback, steps: int = 7) -> L.Trainer:
    return L.Trainer(
        max_steps=steps,
        max_epochs=-1,
        accelerator="cpu",
        logger=[CSVLogger(folder, name="", version="run"), CSVLogger(folder, name="", version="second")],
        log_every_n_steps=2,
        check_val_every_n_epoch=None,
        val_check_interval=3,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
    )


def data() -> SinusoidDataModule:
    return SinusoidDataModule(train_shots=10, val_tasks=4)


def measure() -> GradientAlignment:
    return GradientAlignment(TASKS, tasks_at_once=5)


def rows(folder: Path, logger: str = "run") -> list[dict[str, str]]:
    """The rows of a file, without the empty fields."""
    file = csv.DictReader((folder / logger / "metrics.csv").open())
    return [{key: value for key, value in row.items() if value} for row in file]


def logged(folder: Path) -> dict[str, dict[str, str]]:
    """The rows of the callback, by their meta-iteration."""
    found = [row for row in rows(folder) if "alignment/within" in row]
    assert len({row["step"] for row in found}) == len(found)
    return {row["step"]: row for row in found}


def test_alignment_is_logged_before_during_and_after_training(tmp_path: Path) -> None:
    learner, first = build(), build()
    trainer(tmp_path, measure()).fit(learner, datamodule=data())
    found = logged(tmp_path)
    assert list(found) == ["0", "3", "6", "7"]
    episode = data().episodes("val", torch.arange(TASKS))
    for step, phi in (("0", first.initialisation()), ("7", learner.initialisation())):
        for name, estimate in gradient_alignment(learner.objective, phi, [episode])._asdict().items():
            assert float(found[step][f"alignment/{name}"]) == pytest.approx(estimate.value, rel=1e-4)
            assert float(found[step][f"alignment/{name}_ci95"]) == pytest.approx(estimate.ci95, rel=1e-4)
        assert len(found[step]) == 1 + 8  # nothing else is in these rows
    assert rows(tmp_path) == rows(tmp_path, "second")


def test_it_changes_nothing_about_the_run_and_its_other_rows(tmp_path: Path) -> None:
    plain, measured, states = build(AlwaysNoisy), build(AlwaysNoisy), []
    for learner, folder, callbacks in ((plain, tmp_path / "a", []), (measured, tmp_path / "b", [measure()])):
        torch.manual_seed(1)  # whether such a network is found to differ when vectorised is up to its draws
        trainer(folder, *callbacks).fit(learner, datamodule=data())
        states.append(torch.get_rng_state())
    for a, b in zip(plain.network.parameters(), measured.network.parameters(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(*states)
    for part, values in plain.carried.items():
        for name, value in values.items():
            assert torch.equal(value, measured.carried[part][name])
    others = [row for row in rows(tmp_path / "b") if "alignment/within" not in row]
    assert others == rows(tmp_path / "a")
    paths = [tmp_path / run / "run" / "metrics.csv" for run in "ab"]
    curves = [read_curves([path]) for path in paths]
    assert curves[0] == curves[1]
    assert [step for step, _, _ in curves[0]["val/loss"]] == [3, 6]


def test_a_resumed_run_measures_where_it_goes_on_and_once(tmp_path: Path) -> None:
    trainer(tmp_path / "whole", measure()).fit(build(), datamodule=data())
    first = trainer(tmp_path / "first", measure(), StopAfter(3))
    first.fit(build(), datamodule=data())
    first.save_checkpoint(tmp_path / "c.ckpt")
    trainer(tmp_path / "rest", measure()).fit(build(), datamodule=data(), ckpt_path=tmp_path / "c.ckpt")
    whole = logged(tmp_path / "whole")
    assert list(logged(tmp_path / "first")) == ["0", "3"]
    assert logged(tmp_path / "rest") == {step: whole[step] for step in ("3", "6", "7")}


def test_what_cannot_be_measured_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="tasks=2 must be at least 3"):
        GradientAlignment(tasks=2)
    loader = torch.utils.data.DataLoader([data().episodes("train", torch.arange(2))], batch_size=None)
    with pytest.raises(TypeError, match="needs a MetaLearner and an EpisodeDataModule, given as datamodule"):
        trainer(tmp_path, measure()).fit(build(), loader)
