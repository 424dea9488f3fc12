"""Settings of earlier versions: one's own are refused with what to do, those of checkpoints are read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from fomal.cli import main
from fomal.learner.meta_learner import MetaLearner
from fomal.plots.runs import read_run
from fomal.run.moved import MOVED, REMOVED, current, refusal
from tests.helpers.sine import tiny_model

FORMAT_1 = Path(__file__).parent / "checkpoints" / "format_1.ckpt"
"""Meta-iteration 10 of 20, written by fomal at 36f779a with every plain setting of a learner other than its default."""

MODEL = {
    "network": {"class_path": "fomal.models.MLP", "init_args": {"hidden": [4]}},
    "rule": {"class_path": "fomal.outer.Reptile"},
    "inner_optimizer": {"class_path": "fomal.inner.Adam", "init_args": {"lr": 0.01}},
    "outer_optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.5, "momentum": 0.5}},
    "outer_final": 0.1,
    "inner_steps": 3,
    "inner_batch_size": 4,
    "inner_replacement": True,
    "eval_inner_steps": 6,
    "eval_inner_batch_size": 7,
    "vectorize": True,
    "recorded": False,
    "tasks_per_chunk": 2,
    "outer_clip_val": 10.0,
    "outer_clip_algorithm": "value",
}
"""Its model, in the settings of today."""


def config(folder: Path, model: dict[str, Any], steps: int = 20) -> str:
    """A run as that of `FORMAT_1`, in `folder`/new."""
    logger = {"class_path": "CSVLogger", "init_args": {"save_dir": str(folder), "name": "", "version": "new"}}
    sizes = {"shots": 10, "meta_batch_size": 2, "val_tasks": 5, "test_tasks": 5}
    content = {
        "seed_everything": 3,
        "model": model,
        "data": {"class_path": "fomal.data.SinusoidDataModule", "init_args": sizes},
        "trainer": {"max_steps": steps, "accelerator": "cpu", "enable_progress_bar": False, "logger": logger},
    }
    return yaml.safe_dump(content)


def test_an_older_checkpoint_is_tested_as_by_the_version_that_wrote_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(FORMAT_1, "old.ckpt")
    main(["test", "--ckpt_path", "old.ckpt"])
    results = json.loads(Path("results.json").read_text())
    metrics = {name.removeprefix("test/"): value for name, value in results["metrics"].items()}
    assert metrics["loss_before"] == pytest.approx(4.369230699539185, rel=1e-5)
    assert metrics["loss"] == pytest.approx(4.188272333145141, rel=1e-5)
    assert metrics["distance"] == pytest.approx(0.17025408297777175, rel=1e-4)
    assert not refusal(read_run(tmp_path).settings)


def test_an_older_checkpoint_goes_on_to_where_a_run_of_today_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    whole = main(["fit", "--config", config(tmp_path, MODEL)]).model
    shutil.copy(FORMAT_1, "old.ckpt")
    rest = main(["fit", "--ckpt_path", "old.ckpt"]).model
    assert rest.trainer.global_step == 20
    for name, p in whole.network.named_parameters():
        torch.testing.assert_close(rest.network.get_parameter(name), p, rtol=1e-4, atol=1e-5)
    for part, values in whole.carried.items():
        torch.testing.assert_close(rest.carried[part], values, rtol=1e-4, atol=1e-5)


def test_a_learner_is_made_of_an_older_checkpoint() -> None:
    learner = MetaLearner.load_from_checkpoint(FORMAT_1)
    assert not refusal(f"model.{name}" for name in learner.config["model"])


def test_ones_own_are_refused_all_at_once(tmp_path: Path, fails: Callable[..., str]) -> None:
    (tmp_path / "part.yaml").write_text("meta_iterations_per_step: 2")
    said = "model.meta_iterations_per_step is gone: leave it out, since results never depended on it."
    own = config(tmp_path, tiny_model() | {"meta_iterations_per_step": 1})
    good = config(tmp_path, tiny_model())
    assert fails("fit", "--config", own) == said
    assert fails("fit", "--config", good, "--model.meta_iterations_per_step=5") == said
    assert fails("fit", "--config", good, "--model.meta_iterations_per_step", "5") == said
    assert fails("fit", "--config", good, "--model", str(tmp_path / "part.yaml")) == said
    assert fails("test", "--ckpt_path", str(FORMAT_1), "--model.meta_iterations_per_step=5") == said
    assert [path.name for path in tmp_path.iterdir()] == ["part.yaml"]


def test_a_stored_configuration_gets_the_keys_of_today() -> None:
    stored = {"model": {"meta_iterations_per_step": 5, "adapt": ["*"]}, "data": {"class_path": "x"}}
    assert current(stored) == {"model": {"adapt": ["*"]}, "data": {"class_path": "x"}}
    assert stored["model"]["meta_iterations_per_step"] == 5
    assert current({}) == {}
    assert current({"model": 3, "replicas": 3}) == {"model": 3, "replicas": 3}  # which others refuse


def test_no_key_of_today_is_in_the_table() -> None:
    names = {f"model.{name}" for name in MetaLearner.__init__.__annotations__}
    assert not names & {*MOVED, *REMOVED}
    assert {new.split(".")[1] for news in MOVED.values() for new in news} <= {name[6:] for name in names}
