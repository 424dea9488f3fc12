"""A loss of one's own, in one's own file and one line of YAML, from training to an adapted model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml

from fomal.cli import main
from fomal.learner.meta_learner import MetaLearner
from tests.helpers.colours import config

OWN = """
import torch.nn.functional as F

from fomal.inner import Loss


class Scaled(Loss):
    def __init__(self, scale: float) -> None:
        self.scale = scale

    def __call__(self, forward, x, y):
        return self.scale * F.cross_entropy(forward(x), y, reduction="none")
"""


def test_one_file_and_one_line_of_yaml(
    colours: Path,
    support: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fails: Callable[..., str],
) -> None:
    (tmp_path / "own_losses.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    settings = config(colours, tmp_path, adam=False)
    settings["model"]["loss"] = {"class_path": "own_losses.Scaled", "init_args": {"scale": 3.0}}
    settings["trainer"] |= {"max_steps": 2, "val_check_interval": 2}
    cli = main(["fit", "--config", yaml.safe_dump(settings)])
    assert cli.model.loss.scale == 3
    checkpoint = str(tmp_path / "run" / "checkpoints" / "last.ckpt")
    trust = ["--trust", "own_losses.Scaled"]
    test = ["test", "--ckpt_path", checkpoint, "--trainer.enable_progress_bar=false"]
    assert "names own_losses.Scaled (model.loss.class_path), which is not fomal's" in fails(*test)
    assert main([*test, *trust]).model.loss.scale == 3
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert 0 <= results["metrics"]["test/accuracy"] <= 1
    assert results["config"]["model"]["loss"]["class_path"] == "own_losses.Scaled"

    adapt = ["adapt", "--ckpt_path", checkpoint, "--support", str(support), "--batch_size=9", "--steps=2"]
    assert "names own_losses.Scaled" in fails(*adapt, "--out", str(tmp_path / "refused"), code=1)
    model = main([*adapt, "--out", str(tmp_path / "model"), *trust])
    learner = MetaLearner.load_from_checkpoint(checkpoint, trust=["own_losses"])
    with torch.no_grad():
        logits = learner.network(model.image_format.normalize(model.support))
    expected = 3 * F.cross_entropy(logits, model.labels).item()
    assert model.about["adaptation"]["loss_first_step"] == pytest.approx(expected, rel=1e-4)


def test_a_loss_whose_outputs_are_no_logits_of_classes_is_refused(
    checkpoint: Path, support: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: Callable[..., str]
) -> None:
    loaded = torch.load(checkpoint, weights_only=True)
    for loss, message in (
        ("BradleyTerry", "the checkpoint's loss BradleyTerry does not make the network's outputs logits of classes"),
        ("Huber", "Huber needs floating-point targets, but the data's are torch.int64 labels"),
    ):
        loaded["fomal"]["config"]["model"]["loss"] = {"class_path": f"fomal.inner.{loss}"}
        torch.save(loaded, tmp_path / "changed.ckpt")
        said = fails(
            *("adapt", "--ckpt_path", str(tmp_path / "changed.ckpt"), "--support", str(support)),
            *("--out", str(tmp_path / "model")),
            code=1,
        )
        assert said.startswith(message)
        assert not (tmp_path / "model").exists()
