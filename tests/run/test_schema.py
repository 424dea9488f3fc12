"""Whole but wrong checkpoints: each is named in one line, and none is used."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml

from fomal.cli import main
from fomal.learner.build import build, read_checkpoint
from fomal.run.schema import check_checkpoint

Fails = Callable[..., str]
Content = dict[str, Any]
STEPS = "epoch_loop.manual_optimization.optim_step_progress"
WEIGHT = "network.layers.1.weight"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small run with inner and outer Adam."""
    folder = tmp_path_factory.mktemp("runs")
    config = {
        "model": {
            "network": {"class_path": "fomal.models.MLP", "init_args": {"hidden": [4]}},
            "rule": {"class_path": "fomal.outer.Reptile"},
            "inner_optimizer": {"class_path": "fomal.inner.Adam"},
            "outer": {"optimizer": {"class_path": "torch.optim.Adam", "init_args": {"lr": 0.01}}},
            "train": {"steps": 2},
            "eval": {"steps": 2},
        },
        "data": {"class_path": "fomal.data.SinusoidDataModule", "init_args": {"meta_batch_size": 2, "test_tasks": 4}},
        "trainer": {
            "max_steps": 3,
            "accelerator": "cpu",
            "enable_progress_bar": False,
            "logger": {
                "class_path": "CSVLogger",
                "init_args": {"save_dir": str(folder), "name": "", "version": "run"},
            },
        },
    }
    main(["fit", "--config", yaml.safe_dump(config)])
    return folder / "run"


@pytest.fixture(scope="module")
def last(run: Path) -> Path:
    return run / "checkpoints" / "last.ckpt"


@pytest.fixture
def content(last: Path) -> Content:
    return dict(torch.load(last, weights_only=True))


def put(key: str, value: Any) -> Callable[[Content], None]:
    """Damage that gives the entry `key`, with its levels between slashes, another value."""

    def damage(content: Content) -> None:
        *above, name = (int(part) if part.isdigit() else part for part in key.split("/"))
        for part in above:
            content = content[part]
        content[name] = value

    return damage


def drop(key: str) -> Callable[[Content], None]:
    """Damage that takes an entry away."""

    def damage(content: Content) -> None:
        *above, name = (int(part) if part.isdigit() else part for part in key.split("/"))
        for part in above:
            content = content[part]
        del content[name]

    return damage


def circle() -> dict[str, Any]:
    """A mapping in itself."""
    found: dict[str, Any] = {}
    found["again"] = found
    return found


def laughs() -> list[Any]:
    """A list of 10 ** 12 entries in a few bytes."""
    found: list[Any] = ["ha"]
    for _ in range(12):
        found = [found] * 10
    return found


def deep(levels: int = 3000) -> dict[str, Any]:
    """A mapping in a mapping, and so on."""
    found: dict[str, Any] = {}
    for _ in range(levels):
        found = {"deeper": found}
    return found


SPARSE = torch.eye(3).to_sparse()
MODEL = "fomal/config/model"

WRONG: list[tuple[Callable[[Content], None], str]] = [
    (drop("fomal"), "is not a checkpoint of fomal"),
    (put("fomal", None), "its fomal is null, not a mapping"),
    (put("fomal", [1]), "its fomal is a list, not a mapping"),
    (put("fomal/format", 3), "has format 3, and this version of fomal, .*, reads formats up to 2: install a newer"),
    (put("fomal/format", 10**80), "has format a huge integer, and this version"),
    (put("fomal/format", "1"), "its fomal.format is 1, not an integer"),
    (put("fomal/format", True), "its fomal.format is true, not an integer"),
    (put("fomal/format", 0), "its fomal.format is 0, not an integer of at least 1"),
    (drop("fomal/config"), "its fomal has no entry config"),
    (put("fomal/config", "text"), "its fomal.config is text, not a mapping"),
    (put("fomal/config/seed_everything", None), "its fomal.config.seed_everything is null"),
    (drop("fomal/config/model"), "its fomal.config has no entry model"),
    (drop("fomal/config/data"), "its fomal.config has no entry data"),
    (put("fomal/config/trainer", [1]), "its fomal.config.trainer is a list, not a mapping"),
    (put("fomal/config/data", "fomal.data.Sinusoid"), "its fomal.config.data is fomal.data.Sinusoid, not a mapping"),
    (put(f"{MODEL}/network", "MLP"), "its fomal.config.model.network is MLP, not a mapping"),
    (drop(f"{MODEL}/network/class_path"), "its fomal.config.model.network has no entry class_path"),
    (put(f"{MODEL}/network/class_path", 3), "its fomal.config.model.network.class_path is 3, not a text"),
    (put(f"{MODEL}/network/init_args", [3]), "its fomal.config.model.network.init_args is a list"),
    (put(f"{MODEL}/network/init_args/hidden", torch.ones(2)), r"hidden is \(2,\) float32, not a plain value"),
    (put(f"{MODEL}/train/steps", {3}), "train.steps is a set, not a plain value"),
    (put(f"{MODEL}/train", "other.yaml"), "its fomal.config.model.train is other.yaml, not a mapping"),
    (put(f"{MODEL}/{{3: 4}}", {3: 4}), "key is 3, not a text"),
    (put("fomal/config/more", circle()), "its fomal.config is nested without end"),
    (put("fomal/config/more", laughs()), "its fomal.config is nested without end"),
    (drop("fomal/carried"), "its fomal has no entry carried"),
    (put("fomal/carried", [1]), "its fomal.carried is a list, not a mapping"),
    (
        put("fomal/carried/second_moment", torch.ones(3)),
        r"its fomal.carried.second_moment is \(3,\) float32, not a map",
    ),
    (put("fomal/carried/shared/steps", 3), "its fomal.carried.shared.steps is 3, not a tensor"),
    (drop("fomal/max_steps"), "its fomal has no entry max_steps"),
    (put("fomal/max_steps", "many"), "its fomal.max_steps is many, not an integer of at least -1"),
    (put("fomal/max_steps", 3.0), "its fomal.max_steps is 3.0, not an integer"),
    (put("fomal/skipped_tasks", -1), "its fomal.skipped_tasks is -1, not an integer of at least 0"),
    (put("fomal/versions", "1.0"), "its fomal.versions is 1.0, not a mapping"),
    (put("fomal", {"config": {}, "stopped": {}, "replicas": 3}), "its fomal.replicas is 3, not a list"),
    (put("fomal", {"config": {}, "stopped": {}, "replicas": [{}]}), "its fomal.replicas has 1 entries, not 2 at least"),
    (put("fomal/replicas", [{"format": 9}]), "has format 9"),
    (drop("state_dict"), "it has no entry state_dict"),
    (put("state_dict", []), "its state_dict is a list, not a mapping"),
    (put(f"state_dict/{WEIGHT}", [1.0]), f"its state_dict.{WEIGHT} is a list, not a tensor"),
    (put(f"state_dict/{WEIGHT}", SPARSE), f"its state_dict.{WEIGHT} is sparse, quantised or without values"),
    (put("state_dict/\x1b[31m\n", 3), re.escape(r"its state_dict.\x1b[31m\n is 3, not a tensor")),
    (put("state_dict/" + 10**5 * "x", 3), "x{60}... is 3, not a tensor"),
    (drop("global_step"), "it has no entry global_step"),
    (put("global_step", -3), "its global_step is -3, not an integer of at least 0"),
    (put("global_step", 4), "its global_step is 4, but its loops have done 3 optimiser steps"),
    (put("epoch", 1.5), "its epoch is 1.5, not an integer"),
    (put("epoch", 10**30), "its epoch is 1000000000000000000000000000000, not an integer"),
    (drop("pytorch-lightning_version"), "it has no entry pytorch-lightning_version"),
    (put("pytorch-lightning_version", "new"), "its pytorch-lightning_version is new, not a version of Lightning"),
    (put("pytorch-lightning_version", "1.4.0"), "its pytorch-lightning_version is 1.4.0, not a version"),
    (put("loops", None), "its loops is null, not a mapping"),
    (drop("loops/fit_loop"), "its loops has no entry fit_loop"),
    (drop("loops/test_loop"), "its loops has no entry test_loop"),
    (put("loops/test_loop", 3), "its loops.test_loop is 3, not a mapping"),
    (drop("loops/test_loop/batch_progress/total"), "its loops.test_loop.batch_progress has no entry total"),
    (drop(f"loops/fit_loop/{STEPS}"), f"its loops.fit_loop has no entry {STEPS}"),
    (put("loops/fit_loop/epoch_progress/total/ready", -1), "its loops.fit_loop.epoch_progress.total.ready is -1"),
    (put("loops/fit_loop/epoch_loop.state_dict/_batches_that_stepped", "x"), "_batches_that_stepped is x, not an int"),
    (put("optimizer_states", {}), "its optimizer_states is a mapping, not a list"),
    (put("optimizer_states/0", 3), "its optimizer_states.0 is 3, not a mapping"),
    (drop("optimizer_states/0/param_groups"), "its optimizer_states.0 has no entry param_groups"),
    (put("optimizer_states/0/param_groups/0/params", ["a"]), "params.0 is a, not an integer"),
    (put("optimizer_states/0/state", {"a": {}}), "its optimizer_states.0.state's key is a, not an integer"),
    (put("lr_schedulers", 0), "its lr_schedulers is 0, not a list"),
    (put("lr_schedulers/0", None), "its lr_schedulers.0 is null, not a mapping"),
    (put("callbacks", [3]), "its callbacks is a list, not a mapping"),
    (put("callbacks/SaveLast", {}), "its callbacks.SaveLast has no entry validation_due"),
    (put("callbacks/SaveLast/validation_due", "x"), "validation_due is x, not true or false"),
]


@pytest.mark.parametrize(("damage", "said"), WRONG, ids=[said for _, said in WRONG])
def test_entries_of_a_wrong_kind_are_named(content: Content, damage: Callable[[Content], None], said: str) -> None:
    damage(content)
    with pytest.raises(ValueError, match=said) as error:
        check_checkpoint(content, "x.ckpt")
    assert str(error.value).startswith("x.ckpt ")
    assert len(str(error.value)) < 400
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [None, [], 3, "text", torch.ones(3), {"state_dict": {}}])
def test_other_content_is_none_of_fomals(content: Any) -> None:
    with pytest.raises(ValueError, match="x.ckpt is not a checkpoint of fomal"):
        check_checkpoint(content, "x.ckpt")


def test_a_checkpoint_without_a_number_has_the_first_format(content: Content, tmp_path: Path) -> None:
    assert content["fomal"].pop("format") == 2
    torch.save(content, tmp_path / "old.ckpt")
    assert read_checkpoint(tmp_path / "old.ckpt")["global_step"] == 3
    assert main(["test", "--ckpt_path", str(tmp_path / "old.ckpt"), "--trainer.logger=false"]).model.carried


@pytest.mark.parametrize("verb", ["fit", "test", "validate", "predict", "analyze", "adapt"])
def test_every_verb_refuses_them(verb: str, content: Content, tmp_path: Path, fails: Fails) -> None:
    path = tmp_path / "wrong.ckpt"
    more = ["--support", str(tmp_path), "--out", str(tmp_path / "m")] if verb == "adapt" else []
    for damage, said in ((put("fomal/format", 7), "has format 7"), (put("epoch", None), "its epoch is null")):
        damaged = copy.deepcopy(content)
        damage(damaged)
        torch.save(damaged, path)
        assert said in fails(verb, "--ckpt_path", str(path), *more, code=1 if verb == "adapt" else 2)
    assert [file.name for file in tmp_path.iterdir()] == ["wrong.ckpt"]


# -- what only the network and the optimisers can tell

ADAM = "optimizer_states/0/state/0"
MISFITS: list[tuple[str, Callable[[Content], None], str]] = [
    ("test", drop(f"state_dict/{WEIGHT}"), f"its state_dict has no {WEIGHT}, which the model has"),
    ("test", put("state_dict", {}), "its state_dict has no network.layers.1.bias and "),
    ("test", put("state_dict/network.new", torch.ones(1)), "its state_dict has network.new, which the model has not"),
    (
        "test",
        put(f"state_dict/{WEIGHT}", torch.ones(2, 2)),
        rf"has {WEIGHT} as \(2, 2\) float32, but that of the model",
    ),
    ("test", put(f"state_dict/{WEIGHT}", torch.ones(4, 1).int()), rf"has {WEIGHT} as \(4, 1\) int32, but that of"),
    ("test", put("fomal/carried/third", {}), "its fomal.carried has third, which the state of Adam has not"),
    (
        "test",
        drop("fomal/carried/second_moment"),
        "its fomal.carried has no second_moment, which the state of Adam has",
    ),
    ("test", put("fomal/carried/shared/steps", torch.ones(2)), r"shared has steps as \(2,\) float32, but that of the "),
    ("test", drop("fomal/carried/second_moment/layers.1.bias"), "second_moment has no layers.1.bias, which the state"),
    (
        "test",
        put("fomal/carried/second_moment/layers.1.bias", torch.ones(4).double()),
        r"second_moment has layers.1.bias as \(4,\) float64, but that of the state of Adam is \(4,\) float32",
    ),
    ("test", put("fomal/carried", None), "its fomal.carried is null, so the state of Adam would begin afresh"),
    ("fit", put("fomal/carried", None), "its fomal.carried is null, so the state of Adam would begin afresh"),
    ("fit", put("optimizer_states/0/state", {}), "it has no exp_avg of layers.1.weight, so Adam would begin afresh"),
    ("fit", drop("optimizer_states/0/state/1"), "it has no exp_avg of layers.1.bias, so Adam would begin afresh"),
    ("fit", drop("optimizer_states"), "it has no optimizer_states, and cannot be gone on from: it was saved with weig"),
    ("fit", drop("loops"), "it has no loops, and cannot be gone on from"),
    ("fit", put("optimizer_states", []), "its optimizer_states has 0 entries, not 1"),
    ("fit", put("optimizer_states/0/param_groups/0/params", [0]), "its optimizer_states.0 cannot be used "),
    ("fit", drop("optimizer_states/0/param_groups/0/lr"), "its optimizer_states.0 cannot be used .KeyError: 'lr'"),
    ("fit", put("optimizer_states/0/param_groups/0/lr", float("nan")), "its optimizer_states.0 .* not finite"),
    ("fit", put("optimizer_states/0/param_groups/0/betas", "x"), "its optimizer_states.0 cannot be used"),
    ("fit", put(f"{ADAM}/exp_avg", torch.ones(3, 3)), "its optimizer_states.0 cannot be used"),
    ("fit", put(f"{ADAM}/exp_avg", "x"), "its optimizer_states.0 cannot be used"),
    ("fit", drop(f"{ADAM}/exp_avg_sq"), "it has no exp_avg_sq of layers.1.weight, so Adam"),
    ("fit", put("lr_schedulers/0", {}), "its lr_schedulers.0 cannot be used .KeyError: 'lr_lambdas'"),
    ("fit", put("lr_schedulers/0/last_epoch", 10**9), "last_epoch=1000000000 is none of 0 to global_step=3"),
    ("fit", put("lr_schedulers/0/base_lrs", None), "its lr_schedulers.0 cannot be used"),
    ("fit", put("lr_schedulers/0/base_lrs", [float("nan")]), "its lr_schedulers.0 .* .the step size is not finite"),
    ("fit", put("fomal/max_steps", 5), "trainer.max_steps=3, but the checkpoint's run has 5"),
]


@pytest.mark.parametrize(("verb", "damage", "said"), MISFITS, ids=[said for *_, said in MISFITS])
def test_what_does_not_fit_the_network_or_its_optimisers_is_named(
    verb: str, damage: Callable[[Content], None], said: str, content: Content, tmp_path: Path
) -> None:
    damage(content)
    path = tmp_path / "wrong.ckpt"
    torch.save(content, path)
    learner, data = build(content["fomal"]["config"])
    trainer = L.Trainer(
        max_steps=3, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    with pytest.raises(ValueError, match=said) as error:
        (trainer.fit if verb == "fit" else trainer.test)(learner, datamodule=data, ckpt_path=str(path))
    assert str(error.value).startswith(
        f"ckpt_path={path} does not fit: " if "run has 5" not in said else "trainer.max_steps"
    )
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("allowed", [put("fomal/skipped_tasks", 4), put("fomal/settings/inner_state", "reset")])
def test_a_state_that_there_was_no_need_of_may_be_missing(
    allowed: Callable[[Content], None], content: Content, tmp_path: Path
) -> None:
    allowed(content)
    content["fomal"]["carried"] = None
    torch.save(content, tmp_path / "c.ckpt")
    learner, data = build(content["fomal"]["config"])
    trainer = L.Trainer(max_steps=3, accelerator="cpu", logger=False, enable_progress_bar=False)
    trainer.test(learner, datamodule=data, ckpt_path=str(tmp_path / "c.ckpt"), verbose=False)
    assert learner.carried is None


@pytest.mark.parametrize("entry", ["loops/fit_loop/more_progress", "fomal/config"])
def test_nesting_without_end_is_named(entry: str, content: Content) -> None:
    put(entry, deep())(content)
    with pytest.raises(ValueError, match="^c.ckpt is no whole checkpoint: .*nested without end"):
        check_checkpoint(content, "c.ckpt")


def test_a_misfit_is_one_line_of_the_command_line(content: Content, tmp_path: Path, fails: Fails) -> None:
    path = tmp_path / "wrong.ckpt"
    put(f"state_dict/{WEIGHT}", torch.ones(2, 2))(content)
    torch.save(content, path)
    said = "its state_dict has network.layers.1.weight as (2, 2) float32, but that of the model is (4, 1) float32"
    assert said in fails("test", "--ckpt_path", str(path), "--trainer.logger=false", code=1)


def test_the_state_of_a_callback_is_tried(content: Content, tmp_path: Path) -> None:
    stopping = L.pytorch.callbacks.EarlyStopping("val/loss")
    content["callbacks"][stopping.state_key] = {"patience": 3}
    torch.save(content, tmp_path / "wrong.ckpt")
    learner, data = build(content["fomal"]["config"])
    trainer = L.Trainer(max_steps=3, accelerator="cpu", logger=False, callbacks=[stopping], enable_progress_bar=False)
    with pytest.raises(ValueError, match="its callbacks.EarlyStopping.* cannot be used .KeyError: 'wait_count'"):
        trainer.test(learner, datamodule=data, ckpt_path=str(tmp_path / "wrong.ckpt"))
