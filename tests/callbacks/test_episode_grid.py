"""The picture of a validation task: what is drawn is what validation does, and drawing changes nothing."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fomal.callbacks import EpisodeGrid
from fomal.data import SinusoidDataModule
from fomal.evaluation.protocols import ClassificationResult
from fomal.models import MLP, Conv4
from fomal.tasks.episode import Episode
from tests.helpers.figures import RandomImages, assert_drawn, fit, learner


class Noise(nn.Module):
    """Draws from torch's generator, also in evaluation."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.01 * torch.randn(x.shape)


def images(**settings: Any) -> RandomImages:
    return RandomImages(**{"ways": 3, "shots": 2, "query_shots": 2, "train_shots": 2, "val_tasks": 2, **settings})


def network() -> nn.Module:
    torch.manual_seed(0)
    return Conv4(3, image_size=9, filters=4)


def test_the_task_drawn_is_that_of_validation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[Path, Episode, Tensor, str, int]] = []
    monkeypatch.setattr("fomal.callbacks.episode_grid.draw_episode", lambda *what: drawn.append(what))
    monkeypatch.setattr("fomal.callbacks.episode_grid.log_figure", lambda *what: None)
    model, data = learner(nn.Sequential(network(), nn.Dropout(0.5))), images()
    fit(model, data, tmp_path, EpisodeGrid(task=1, shown=4))
    ((path, episode, logits, title, shown),) = drawn
    assert path == tmp_path / "run" / "episode.png"
    assert (title, shown) == ("Validation task 1 after 4 meta-iterations", 4)
    stored = data.episodes("val", torch.tensor([1]))
    assert episode.support_x.dtype == torch.uint8  # as stored, not as the network gets it
    assert episode.support_x.equal(stored.support_x)
    assert episode.query_x.equal(stored.query_x)
    result = model.eval().evaluate(data.on_after_batch_transfer(stored, 0))
    assert isinstance(result, ClassificationResult)
    torch.testing.assert_close(logits, result.logits[0])
    assert not torch.allclose(logits, result.logits_transductive[0], atol=1e-3)


def test_drawing_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []
    monkeypatch.setattr(
        "fomal.callbacks.episode_grid.log_figure", lambda trainer, *what: steps.append(trainer.global_step)
    )
    results = []
    for name, callbacks in {"with": [EpisodeGrid(after_validation=True)], "without": []}.items():
        model = learner(nn.Sequential(network(), nn.Dropout(0.3), Noise()))
        model.network[1].eval()  # type: ignore[index, union-attr] # frozen by its owner
        fit(model, images(), tmp_path / name, *callbacks, max_steps=5, log_every_n_steps=1)
        modes = [module.training for module in model.modules()]
        results.append((model.state_dict(), modes, torch.rand(3), (tmp_path / name / "run/metrics.csv").read_text()))
    (state, modes, after, metrics), (expected, *others) = results
    assert steps == [2, 4, 5]  # each validation, and the end
    assert all(value.equal(expected[key]) for key, value in state.items())
    assert modes == others[0]
    assert after.equal(others[1])
    assert metrics == others[2]
    assert_drawn(tmp_path / "with" / "run" / "episode.png")
    assert not list((tmp_path / "without").rglob("*.png"))


def test_the_precision_is_that_of_validation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Tensor] = []
    monkeypatch.setattr("fomal.callbacks.episode_grid.draw_episode", lambda *what: drawn.append(what[2]))
    monkeypatch.setattr("fomal.callbacks.episode_grid.log_figure", lambda *what: None)
    model, data = learner(network()), images()
    fit(model, data, tmp_path, EpisodeGrid(), precision="bf16-mixed")
    episode = data.on_after_batch_transfer(data.episodes("val", torch.tensor([0])), 0)
    with torch.autocast("cpu", torch.bfloat16):
        assert drawn[0].equal(model.evaluate(episode).logits[0])
    assert not drawn[0].equal(model.evaluate(episode).logits[0])


def test_other_data_trials_and_runs_without_validation_are_left_alone(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(EpisodeGrid|draw).*")
        fit(learner(MLP(hidden=[4])), SinusoidDataModule(val_tasks=2), tmp_path, EpisodeGrid(after_validation=True))
        fit(learner(network()), images(), tmp_path, EpisodeGrid(), fast_dev_run=True)
        fit(learner(network()), images(), tmp_path, EpisodeGrid(), val_check_interval=100)
    assert not list(tmp_path.rglob("*.png"))


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="task=-1"):
        EpisodeGrid(task=-1)
    with pytest.raises(ValueError, match="shown=0"):
        EpisodeGrid(shown=0)
