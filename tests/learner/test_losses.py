"""The learner's loss, from the constructor and the command line to checkpoints, evaluations and tables."""

from __future__ import annotations

import csv
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import nn

from fomal.analysis.report import analyze
from fomal.callbacks.results import _classification_rows, _regression_rows
from fomal.cli import main
from fomal.data import SinusoidDataModule
from fomal.inner import SGD, BinaryCrossEntropy, Huber, SquaredError
from fomal.learner.meta_learner import MetaLearner
from fomal.learner.replicas import Replicas
from fomal.learner.settings import InnerSchedule
from fomal.models import MLP
from fomal.outer import MAML, Reptile
from fomal.run.trust import is_known
from fomal.tasks.episode import NO_TARGET, Episode
from fomal.utils import tree
from tests.helpers.learners import trainer
from tests.helpers.sine import tiny_model


def learner(**settings: Any) -> MetaLearner:
    settings = {"train": InnerSchedule(1, 4), "eval": InnerSchedule(1, 5)} | settings
    return MetaLearner(settings.pop("network", MLP(hidden=(4,))), settings.pop("rule", Reptile()), SGD(0.1), **settings)


def sines(**settings: Any) -> SinusoidDataModule:
    return SinusoidDataModule(meta_batch_size=2, val_tasks=2, test_tasks=2, **settings)


def test_the_inner_loop_and_the_query_sets_have_each_their_loss() -> None:
    data = sines()
    data.setup("fit")
    episode = data.episodes("val", torch.arange(2))
    own = learner(loss=Huber(0.3), query_loss=SquaredError())
    result = own.evaluate(episode)
    for t in range(2):
        network = MLP(hidden=(4,))
        network.load_state_dict(own.network.state_dict())
        index = own.inner_loop(episode, training=False).indices[0][t]
        x, y = episode.support_x[t][index], episode.support_y[t][index]
        gradient = torch.autograd.grad(F.huber_loss(network(x), y, delta=0.3), list(network.parameters()))
        before = F.mse_loss(network(episode.query_x[t]), episode.query_y[t])
        with torch.no_grad():
            for p, g in zip(network.parameters(), gradient, strict=True):
                p -= 0.1 * g
        after = F.mse_loss(network(episode.query_x[t]), episode.query_y[t])
        torch.testing.assert_close(result.losses[t], torch.stack([before, after]).detach())


def test_another_loss_in_its_place_is_used_from_then_on() -> None:
    data = sines()
    data.setup("fit")
    episode = data.episodes("val", torch.arange(2))
    own = learner()
    before = own.evaluate(episode).losses[:, 0]
    own.loss = Huber(1e-3)
    after = own.evaluate(episode).losses[:, 0]
    outputs = own(episode.query_x.flatten(0, 1)).view(episode.query_y.shape)
    expected = F.huber_loss(outputs, episode.query_y, delta=1e-3, reduction="none").mean((1, 2))
    torch.testing.assert_close(after, expected.detach())
    assert (after < 0.1 * before).all()


def test_a_query_loss_is_checked_where_a_query_set_is_first_met() -> None:
    own, data = learner(query_loss=BinaryCrossEntropy()), sines()
    data.setup("fit")
    episode = data.episodes("val", torch.arange(2))
    own.inner_loop(episode._replace(query_x=episode.query_x[:, :0], query_y=episode.query_y[:, :0]), training=True)
    with pytest.raises(ValueError, match="^BinaryCrossEntropy needs targets from 0 to 1, but the data have"):
        own.inner_loop(episode, training=False)
    with pytest.raises(ValueError, match="^Huber needs floating-point targets"):
        learner(network=nn.Linear(2, 3), loss=Huber()).inner_loop(labelled(), training=True)


def labelled() -> Episode:
    y = torch.arange(3).repeat(2, 2)
    x = torch.rand(2, 6, 2)
    return Episode(x, y, x, y, torch.arange(2), 3)


def test_targets_that_look_like_labels_are_told_of_once(caplog: pytest.LogCaptureFixture) -> None:
    y = (torch.rand(2, 6, 3) > 0.5).float()
    x = torch.rand(2, 6, 2)
    episode = Episode(x, y, x, y, torch.arange(2))

    def lines(episode: Episode, **settings: Any) -> list[str]:
        caplog.clear()
        own = learner(network=nn.Linear(2, episode.support_y[0, 0].numel()), **settings)
        with caplog.at_level(logging.INFO):
            own.inner_loop(episode, training=True)
            own.inner_loop(episode, training=True)
        return [record.getMessage() for record in caplog.records if "BinaryCrossEntropy" in record.getMessage()]

    (line,) = lines(episode)
    assert "their loss is the squared error" in line
    assert lines(episode, loss=SquaredError()) == []
    assert lines(episode, loss=BinaryCrossEntropy()) == []
    assert lines(episode._replace(support_y=0.5 * y)) == []
    one = y[..., :1]
    assert lines(episode._replace(support_y=one, query_y=one)) == []


def test_a_checkpoint_of_python_asks_for_its_losses(tmp_path: Path) -> None:
    own = learner(loss=Huber(0.3), query_loss=SquaredError())
    runs = trainer(1)
    runs.fit(own, datamodule=sines())
    path = tmp_path / "own.ckpt"
    runs.save_checkpoint(path)
    given: dict[str, Any] = {"network": MLP(hidden=(4,)), "rule": Reptile(), "inner_optimizer": SGD(0.1)}
    with pytest.raises(
        ValueError, match=re.escape("loss=fomal.inner.loss_of_targets.Huber: give load_from_checkpoint")
    ):
        MetaLearner.load_from_checkpoint(path, **given)
    with pytest.raises(ValueError, match="query_loss=fomal.inner.loss_of_targets.SquaredError: give"):
        MetaLearner.load_from_checkpoint(path, **given, loss=Huber(0.3))
    loaded = MetaLearner.load_from_checkpoint(path, **given, loss=Huber(0.3), query_loss=None)
    assert loaded.loss.delta == 0.3


def test_replicas_have_one_loss() -> None:
    with pytest.raises(ValueError, match="^replica 1 has another loss than replica 0"):
        Replicas([learner(loss=Huber(0.3)), learner(loss=Huber(0.2))])
    assert Replicas([learner(loss=Huber(0.3)), learner(loss=Huber(0.3))]).learners[0].loss.delta == 0.3


def test_an_analysis_is_of_one_loss() -> None:
    own = learner(query_loss=Huber())
    phi = tree.detach(dict(own.network.named_parameters()))
    with pytest.raises(ValueError, match="^query_loss=Huber: the expansion is of one loss on all mini-batches"):
        analyze(own.objective, phi, lambda n: labelled(), {"MAML": MAML()}, tasks=3, batches=2, batch_size=2, lr=0.1)


def test_fomals_losses_are_trusted() -> None:
    assert is_known("fomal.inner.Huber")
    assert is_known("fomal.inner.loss_of_labels.CrossEntropy")
    assert is_known("torch.nn.L1Loss")
    assert not is_known("fomal.inner.objective.Objective")


@pytest.mark.parametrize(
    ("loss", "outputs", "columns"),
    [
        ({"class_path": "fomal.inner.Elementwise", "init_args": {"loss": {"class_path": "torch.nn.L1Loss"}}}, 1, [""]),
        ({"class_path": "fomal.inner.Quantile", "init_args": {"q": [0.1, 0.5, 0.9]}}, 3, ["_0", "_1", "_2"]),
        ("fomal.inner.GaussianLikelihood", 2, ["_0", "_1"]),
    ],
)
def test_from_yaml_to_predictions(loss: Any, outputs: int, columns: list[str], tmp_path: Path) -> None:
    logger = {"class_path": "CSVLogger", "init_args": {"save_dir": str(tmp_path), "name": "", "version": "run"}}
    model = tiny_model() | {"loss": loss}
    settings = {
        "model": model,
        "data": {
            "class_path": "fomal.data.SinusoidDataModule",
            "init_args": {"meta_batch_size": 2, "val_tasks": 2, "test_tasks": 2},
        },
        "trainer": {"max_steps": 1, "accelerator": "cpu", "logger": logger, "enable_progress_bar": False},
    }
    main(["fit", "--config", yaml.safe_dump(settings)])
    checkpoint = tmp_path / "run" / "checkpoints" / "last.ckpt"
    cli = main(["predict", "--ckpt_path", str(checkpoint), "--trainer.enable_progress_bar=false"])
    kind = loss if isinstance(loss, str) else loss["class_path"]
    assert type(cli.model.loss).__name__ == kind.rpartition(".")[2]
    assert len(cli.model.network(torch.zeros(1, 1))[0]) == outputs
    with (tmp_path / "run" / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [key for key in rows[0] if key.startswith("prediction")] == [f"prediction{column}" for column in columns]


def test_rows_of_many_labels_and_of_several_predictions() -> None:
    y = torch.tensor([[[0, NO_TARGET], [1, 1]]])  # (1, 2, 2)
    logits = torch.tensor([[[[2.0, 0.0], [0.0, 1.0]], [[0.0, 3.0], [1.0, 0.0]]]])
    outputs = {"query_y": y, "number": torch.tensor([7]), "logits": logits, "logits_transductive": logits}
    rows = _classification_rows(outputs)
    assert [(row["query"], row["place"], row["label"], row["prediction"]) for row in rows] == [
        *((0, 0, 0, 0), (0, 1, "", 1), (1, 0, 1, 1), (1, 1, 1, 0))
    ]
    predictions = torch.arange(4.0).view(1, 1, 4)  # means of both targets, then log variances
    rows = _regression_rows(
        {"query_y": torch.tensor([[[5.0, 6.0]]]), "number": torch.tensor([7]), "predictions": predictions}
    )
    assert [(row["target"], row["prediction_0"], row["prediction_1"]) for row in rows] == [(5, 0, 2), (6, 1, 3)]


@pytest.mark.parametrize("name", ["loss", "query_loss"])
def test_a_loss_of_torchs_is_refused(name: str) -> None:
    with pytest.raises(
        ValueError, match=rf"^{name}=HuberLoss is no fomal.inner.Loss: .*, or Elementwise\(...\) around"
    ):
        learner(**{name: nn.HuberLoss()})
