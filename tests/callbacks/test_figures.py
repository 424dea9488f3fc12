"""Figures of a run: what is drawn is what the network does."""

from __future__ import annotations

import csv
import errno
import os
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from fomal import loggers
from fomal.callbacks import AdaptationFigure, LearningCurve, SaveLast
from fomal.data import SinusoidDataModule
from fomal.models import MLP, Conv4
from fomal.plots.curve import read_curves
from fomal.tasks.episode import Episode
from tests.helpers.figures import RandomImages, assert_drawn, fit, learner
from tests.helpers.oracle import adapt_one, batches


class Backwards(SinusoidDataModule):
    """Queries from right to left."""

    def episodes(self, split: str, number: Tensor) -> Episode:
        episode = super().episodes(split, number)
        return episode._replace(query_x=episode.query_x.flip(1), query_y=episode.query_y.flip(1))


def test_both_figures_are_in_the_folder_of_the_run(tmp_path: Path) -> None:
    torch.manual_seed(0)
    data = SinusoidDataModule(meta_batch_size=2, val_tasks=4)
    fit(learner(MLP(hidden=[4])), data, tmp_path, AdaptationFigure(), LearningCurve())
    assert_drawn(tmp_path / "run" / "adaptation.png")
    assert_drawn(tmp_path / "run" / "curve.png")
    steps = {step for curve in read_curves([tmp_path / "run" / "metrics.csv"]).values() for step, _, _ in curve}
    assert steps == {2, 4}  # in meta-iterations, the last one too


def test_the_adaptation_drawn_is_that_of_torch_optim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: dict[str, Any] = {}
    monkeypatch.setattr("fomal.callbacks.figures.draw_adaptation", lambda path, **what: drawn.update(what, path=path))
    torch.manual_seed(0)
    network = nn.Sequential(MLP(hidden=[8]), nn.Dropout(0.0)).double()
    data = Backwards(meta_batch_size=2, query_shots=20, seed=5)
    model = learner(network)
    fit(model, data, tmp_path, AdaptationFigure(steps=[0, 1, 6, 7], task=3))
    assert model.training
    episode = data.episodes("val", torch.tensor([3])).floating(torch.float64)
    x = episode.query_x.flip(1)
    assert drawn["path"] == tmp_path / "run" / "adaptation.png"
    assert drawn["x"] == x.flatten().tolist() == sorted(drawn["x"])
    assert drawn["truth"] == pytest.approx(episode.query_y.flip(1).flatten().tolist())
    assert drawn["support"] == (episode.support_x.flatten().tolist(), episode.support_y.flatten().tolist())
    assert list(drawn["predictions"]) == [0, 1, 6]  # the evaluation has no seventh step
    assert drawn["predictions"][0] == pytest.approx(network(x[0]).flatten().tolist(), rel=1e-12)
    xs, ys = batches(episode, model.inner_loop(episode, training=False).indices, 0)
    carried = {  # the state that training left to evaluation
        index: {
            "step": model.carried["shared"]["steps"].float(),
            "exp_avg": torch.zeros_like(moment),
            "exp_avg_sq": moment,
        }
        for index, moment in enumerate(model.carried["second_moment"].values())
    }
    adam = torch.optim.Adam(network.parameters(), lr=0.01, betas=(0.0, 0.999))
    state = {"state": carried, "param_groups": adam.state_dict()["param_groups"]}
    for steps in (1, 6):
        adapted, _, _ = adapt_one(
            network, lambda p: torch.optim.Adam(p, lr=0.01, betas=(0.0, 0.999)), xs[:steps], ys[:steps], state
        )
        expected = adapted(x[0]).flatten().tolist()
        assert drawn["predictions"][steps] == pytest.approx(expected, rel=1e-9)
        assert drawn["predictions"][0] != pytest.approx(expected, rel=1e-3)


def test_dropout_is_off_in_the_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: dict[str, Any] = {}
    monkeypatch.setattr("fomal.callbacks.figures.draw_adaptation", lambda path, **what: drawn.update(what))
    network = nn.Sequential(nn.Linear(1, 8), nn.Dropout(0.5), nn.Linear(8, 1))
    fit(learner(network), data := SinusoidDataModule(query_shots=20), tmp_path, AdaptationFigure())
    x = data.episodes("val", torch.tensor([0])).query_x[0]
    assert drawn["predictions"][0] == pytest.approx(network.eval()(x).flatten().tolist(), rel=1e-4, abs=1e-6)


def test_classification_is_not_drawn(tmp_path: Path) -> None:
    data = RandomImages(ways=3, shots=2, train_shots=2, val_tasks=2)
    with pytest.warns(UserWarning, match="AdaptationFigure draws regression tasks of one input and one output only"):
        fit(learner(Conv4(3, image_size=9, filters=4)), data, tmp_path, AdaptationFigure())
    assert not list(tmp_path.rglob("*.png"))


def test_a_trial_or_a_run_without_validation_leaves_no_figure(tmp_path: Path) -> None:
    data, model = SinusoidDataModule(val_tasks=2), learner(MLP(hidden=[4]))
    fit(model, data, tmp_path, AdaptationFigure(), LearningCurve(), fast_dev_run=True)
    fit(model, data, tmp_path, LearningCurve(), val_check_interval=100, log_every_n_steps=1)
    assert (tmp_path / "run" / "metrics.csv").is_file()
    assert not list(tmp_path.rglob("*.png"))


@pytest.mark.parametrize("wrong", [{"steps": (0, -1)}, {"task": -1}])
def test_negative_numbers_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must not be negative"):
        AdaptationFigure(**wrong)


def test_a_full_disk_ends_no_run_for_a_picture_or_a_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkpoint is safe, and rows are written as soon as there is room again."""
    full = [True]

    def append(path: Path, columns: Any, rows: Any, write: Any = loggers._append) -> None:
        if full[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path, columns, rows)

    def savefig(figure: Figure, path: Path, **settings: Any) -> None:
        path.write_bytes(b"the beginning")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    class Room(L.Callback):
        def on_train_end(self, *args: Any) -> None:
            full[0] = False

    monkeypatch.setattr(loggers, "_append", append)
    monkeypatch.setattr(Figure, "savefig", savefig)
    torch.manual_seed(0)
    data, last = SinusoidDataModule(meta_batch_size=2, val_tasks=4), SaveLast(2, dirpath=str(tmp_path / "checkpoints"))
    told = {"log_every_n_steps": 1, "enable_checkpointing": True}
    with pytest.warns(UserWarning, match="without") as found:
        fit(learner(MLP(hidden=[4])), data, tmp_path, last, AdaptationFigure(), LearningCurve(), Room(), **told)
    said = [str(warning.message) for warning in found if "could not be written" in str(warning.message)]
    folder = tmp_path / "run"
    for what, name in (("metrics.csv", ""), ("adaptation.png", "The run goes on without"), ("curve.png", "The run")):
        line, *_ = [line for line in said if str(folder / what) in line]
        assert line.startswith(name)
        assert f"No space left on device): make room on the disk of {folder}, or choose another folder." in line
    assert sorted(file.name for file in folder.iterdir()) == ["metrics.csv"]
    assert (tmp_path / "checkpoints" / "last.ckpt").is_file()
    with (folder / "metrics.csv").open() as file:
        steps = [row["step"] for row in csv.DictReader(file) if row["val/loss"]]
    assert steps == ["2", "4"]
