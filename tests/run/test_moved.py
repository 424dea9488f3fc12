"""Settings of earlier versions: one's own are refused with what to do, those of checkpoints are read."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import fields
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from fomal.cli import main
from fomal.inner import Adam
from fomal.learner.meta_learner import MetaLearner
from fomal.learner.settings import GROUPS, EvalSchedule, Execution, InnerSchedule
from fomal.models import MLP
from fomal.outer import Reptile
from fomal.plots.runs import read_run
from fomal.run.moved import MOVED, REMOVED, current, refusal
from tests.helpers.sine import tiny_model

FORMAT_1 = Path(__file__).parent / "checkpoints" / "format_1.ckpt"
"""Meta-iteration 10 of 20, written by fomal at 36f779a with every plain setting of a learner other than its default."""

MODEL = {
    "network": {"class_path": "fomal.models.MLP", "init_args": {"hidden": [4]}},
    "rule": {"class_path": "fomal.outer.Reptile"},
    "inner_optimizer": {"class_path": "fomal.inner.Adam", "init_args": {"lr": 0.01}},
    "outer": {
        "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.5, "momentum": 0.5}},
        **{"final": 0.1, "clip_val": 10.0, "clip_algorithm": "value"},
    },
    "train": {"steps": 3, "batch_size": 4, "replacement": True},
    "eval": {"steps": 6, "batch_size": 7, "replacement": True},
    "execution": {"vectorize": True, "traced": False, "tasks_per_chunk": 2},
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
    assert (learner.train_schedule, learner.eval_schedule) == (InnerSchedule(3, 4, True), EvalSchedule(6, 7, True))
    assert learner.execution == Execution(vectorize=True, traced=False, tasks_per_chunk=2)
    assert (learner.outer.final, learner.outer.clip_val, learner.outer.clip_algorithm) == (0.1, 10.0, "value")
    assert not refusal(f"model.{name}" for name in learner.config["model"])


def test_the_settings_of_an_older_checkpoint_made_in_python_are_read(tmp_path: Path) -> None:
    content = torch.load(FORMAT_1, weights_only=True)
    content["fomal"]["config"] = {}
    torch.save(content, tmp_path / "old.ckpt")
    objects = {"network": MLP(hidden=[4]), "rule": Reptile(), "inner_optimizer": Adam(0.01)}
    learner = MetaLearner.load_from_checkpoint(tmp_path / "old.ckpt", **objects)
    assert (learner.train_schedule, learner.eval_schedule) == (InnerSchedule(3, 4, True), EvalSchedule(6, 7, True))
    assert (learner.outer.final, learner.outer.clip_val, learner.outer.clip_algorithm) == (0.1, 10.0, "value")
    kept = learner._kept()
    assert kept["outer"] == {
        **{"final": 0.1, "clip_val": 10.0, "clip_algorithm": "value", "parameters": "all", "on_nonfinite": "raise"}
    }
    with pytest.raises(TypeError, match=r"^model.inner_steps is now model.train.steps\.$"):
        MetaLearner.load_from_checkpoint(tmp_path / "old.ckpt", **objects, inner_steps=3)
    del content["fomal"]["settings"]
    torch.save(content, tmp_path / "older.ckpt")
    learner = MetaLearner.load_from_checkpoint(tmp_path / "older.ckpt", **objects)
    assert (learner.train_schedule, learner.eval_schedule) == (InnerSchedule(5, 10), EvalSchedule(50, 5))


def test_a_schedule_does_not_take_the_place_of_a_method() -> None:
    learner = MetaLearner(MLP(), Reptile(), Adam())
    with pytest.raises(AttributeError, match=r"^eval is a method of modules: set eval_schedule instead\.$"):
        learner.eval = InnerSchedule(10, 5)
    assert learner.eval() is learner


@pytest.mark.parametrize("old", [*MOVED, *REMOVED])
def test_arguments_and_attributes_are_refused_in_python(old: str) -> None:
    said = "^" + re.escape(refusal([old])) + r"\.$"
    name = old.removeprefix("model.")
    with pytest.raises(TypeError, match=said):
        MetaLearner(MLP(), Reptile(), Adam(), **{name: 1})
    learner = MetaLearner(MLP(), Reptile(), Adam())
    with pytest.raises(AttributeError, match=said):
        setattr(learner, name, 1)


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
    assert fails("fit", "--config", good, "--model.inner_steps=5", "--model.outer_optimizer.lr=1") == (
        "model.inner_steps is now model.train.steps; model.outer_optimizer is now model.outer.optimizer."
    )
    replicas = "--replicas=[{model.outer_optimizer.lr: 1.0}, {}]"
    assert fails("fit", "--config", good, replicas, code=1) == (
        "replicas: model.outer_optimizer is now model.outer.optimizer."
    )
    assert [path.name for path in tmp_path.iterdir()] == ["part.yaml"]


def test_a_stored_configuration_gets_the_keys_of_today() -> None:
    stored = {"model": {"meta_iterations_per_step": 5, "adapt": ["*"]}, "data": {"class_path": "x"}}
    assert current(stored) == {"model": {"adapt": ["*"]}, "data": {"class_path": "x"}}
    assert stored["model"]["meta_iterations_per_step"] == 5
    stored["model"] = {"inner_replacement": True, "train": {"steps": 3}}
    stored["replicas"] = [
        {"model.outer_optimizer.lr": 0.1},
        {"seed_everything": 1, "model.meta_iterations_per_step": 2},
    ]
    found = current(stored)
    assert found["model"] == {"train": {"steps": 3, "replacement": True}, "eval": {"replacement": True}}
    assert found["replicas"] == [{"model.outer.optimizer.lr": 0.1}, {"seed_everything": 1}]
    assert stored["model"]["train"] == {"steps": 3}
    assert current({"model": {"inner_steps": 3, "train": "x.yaml"}}) == {"model": {"train": "x.yaml"}}
    assert current({}) == {}
    assert current({"model": 3, "replicas": 3}) == {"model": 3, "replicas": 3}  # which others refuse


def test_the_table_leads_to_settings_of_today() -> None:
    names = {f"model.{name}" for name in signature(MetaLearner.__init__).parameters}
    groups = {f"model.{name}.{field.name}" for name, group in GROUPS.items() for field in fields(group)}
    assert not (names | groups) & {*MOVED, *REMOVED}
    later = {"model.train.reduction", "model.eval.reduction", "model.eval.report_steps"}
    assert {new for news in MOVED.values() for new in news} == groups - later
    assert len(names) <= 12 + 1  # and self
