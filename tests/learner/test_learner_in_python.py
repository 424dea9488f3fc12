"""The learner in plain Python: Lightning's default Trainer, in any order, and the ways to keep and copy a module."""

from __future__ import annotations

import copy
import io
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from torch import nn

from fomal.cli import main
from fomal.data import SinusoidDataModule
from fomal.inner import SGD, Adam
from fomal.learner.meta_learner import MetaLearner
from fomal.learner.settings import InnerSchedule
from fomal.models import MLP
from fomal.outer import FOMAML, MAML, Reptile
from tests.helpers.learners import Blobs, blob_learner, sine_learner, trainer, weights
from tests.helpers.resume import same
from tests.helpers.sine import tiny_model

DATA = {"meta_batch_size": 2, "val_tasks": 3, "test_tasks": 4}


def small(**settings: Any) -> MetaLearner:
    torch.manual_seed(0)
    return sine_learner(network=MLP(hidden=[4]), train={"steps": 2}, **settings)


@pytest.mark.traced
@pytest.mark.parametrize("rule", [Reptile(), MAML()])
def test_every_verb_works_in_any_order_with_a_default_trainer(
    rule: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    learner, data = small(rule=rule, inner=SGD(0.01)), SinusoidDataModule(**DATA, train_query_shots=2)
    for verb in ("test", "fit", "predict", "fit"):
        getattr(L.Trainer(max_steps=2, accelerator="cpu"), verb)(learner, datamodule=data)
    run = L.Trainer(max_steps=2, accelerator="cpu")  # the same one, as in a notebook
    run.validate(learner, datamodule=data)
    run.fit(learner, datamodule=data)
    run.test(learner, datamodule=data)
    assert (run.global_step, learner.results["tasks"]) == (2, 4)


def test_evaluating_before_training_changes_nothing() -> None:
    found = []
    for verbs in (["fit"], ["test", "validate", "predict", "fit"]):
        learner = blob_learner()
        for verb in verbs:
            getattr(trainer(3, inference_mode=True), verb)(learner, datamodule=Blobs(test_tasks=4, val_tasks=3))
        found.append(weights(learner))
    same(*found)


def test_a_call_predicts_with_the_initialisation() -> None:
    learner = small()
    x = torch.randn(5, 1)
    assert torch.equal(learner(x), learner.network(x))


@pytest.mark.traced
def test_it_is_pickled_copied_and_saved_after_training() -> None:
    learner, data = small(inner=Adam(0.01)), SinusoidDataModule(**DATA)
    trainer(2).fit(learner, datamodule=data)
    buffer = io.BytesIO()
    torch.save(learner, buffer)
    buffer.seek(0)
    copies = [
        pickle.loads(pickle.dumps(learner)),
        copy.deepcopy(learner),
        torch.load(buffer, weights_only=False),
    ]
    trainer(2).fit(learner, datamodule=data)
    for other in copies:
        assert other.network is not learner.network
        assert not torch.equal(next(iter(weights(other).values())), next(iter(weights(learner).values())))
        trainer(2).fit(other, datamodule=data)
        same(weights(other), weights(learner))
        same(other.carried, learner.carried)


def test_settings_may_be_changed_afterwards() -> None:
    learner, data = small(), SinusoidDataModule(**DATA)
    trainer().test(learner, datamodule=data, verbose=False)
    learner.eval_schedule = replace(learner.eval_schedule, steps=7, batch_size=3)
    trainer().test(learner, datamodule=data, verbose=False)
    assert len(learner.results["loss_by_step"]) == 8
    shorter = {"train": {"steps": 2}, "eval": {"steps": 7, "batch_size": 3}}
    expected = sine_learner(network=MLP(hidden=[4]), **shorter)
    expected.network.load_state_dict(learner.network.state_dict())
    trainer().test(expected, datamodule=data, verbose=False)
    assert learner.results == expected.results
    with pytest.raises(ValueError, match="model.train or model.eval: steps=-1 must not be negative"):
        replace(learner.eval_schedule, steps=-1)
    learner.rule, learner.train_schedule = FOMAML(tail_shots=1), InnerSchedule(1)
    with pytest.raises(ValueError, match="model.train.steps=1 leaves no step before the separate tail"):
        trainer(1).fit(learner, datamodule=data)


def test_another_network_takes_the_place_of_the_first() -> None:
    learner, data = blob_learner(), Blobs(test_tasks=4)
    trainer(1).fit(learner, datamodule=data)
    torch.manual_seed(1)
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(196, 3))
    expected = blob_learner(network=copy.deepcopy(network))
    learner.network, learner.carried = network, None
    for one in (learner, expected):
        trainer(2).fit(one, datamodule=data)
    same(weights(learner), weights(expected))


# -- from a checkpoint


def saved(learner: MetaLearner, path: Path, **settings: Any) -> Path:
    run = trainer(3, **settings)
    run.fit(learner, datamodule=SinusoidDataModule(**DATA))
    run.save_checkpoint(path)
    return path


def test_a_checkpoint_made_in_python_needs_the_objects_alone(tmp_path: Path) -> None:
    learner = small(inner=Adam(0.01), eval={"steps": 6}, inner_state="carried", outer={"clip_val": 3.0})
    path = saved(learner, tmp_path / "c.ckpt", precision="64-true")
    message = r"was made in Python, .*: use load_from_checkpoint\('.*c.ckpt', network=..., rule=..., inner_optimizer="
    with pytest.raises(ValueError, match=message):
        MetaLearner.load_from_checkpoint(path)
    with pytest.raises(ValueError, match="give load_from_checkpoint rule and inner_optimizer too"):
        MetaLearner.load_from_checkpoint(path, network=MLP(hidden=[4]))
    loaded = MetaLearner.load_from_checkpoint(
        path, network=MLP(hidden=[4]), rule=Reptile(), inner_optimizer=Adam(0.01), train=InnerSchedule(3)
    )
    same(weights(loaded), weights(learner))
    same(loaded.carried, learner.carried)
    assert next(iter(weights(loaded).values())).dtype == torch.float64
    assert (loaded.eval_schedule, loaded.outer.clip_val, loaded.train_schedule.steps) == (learner.eval_schedule, 3.0, 3)
    results = []
    for one in (learner, loaded):
        trainer(precision="64-true").test(one, datamodule=SinusoidDataModule(**DATA), verbose=False)
        results.append(one.results)
    assert results[0] == results[1]


def test_a_checkpoint_of_the_command_line_needs_nothing_else(tmp_path: Path) -> None:
    config = {
        "seed_everything": 3,
        "model": tiny_model("Adam", lr=0.01),
        "data": {"class_path": "fomal.data.SinusoidDataModule", "init_args": DATA},
        "trainer": {"max_steps": 3, "accelerator": "cpu", "logger": False, "default_root_dir": str(tmp_path)},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    made = main(["fit", "--config", str(tmp_path / "run.yaml")])
    path = tmp_path / "checkpoints" / "last.ckpt"
    loaded = MetaLearner.load_from_checkpoint(path)
    same(weights(loaded), weights(made.model))
    same(loaded.carried, made.model.carried)
    assert loaded.config == made.model.config
    assert loaded.eval_schedule.steps == 2
    x = torch.randn(4, 1)
    assert torch.equal(loaded(x), made.model.network(x))
    trainer(2).fit(loaded, datamodule=SinusoidDataModule(**DATA))


def test_a_checkpoint_whose_weights_are_not_finite_is_refused(tmp_path: Path) -> None:
    path = saved(small(), tmp_path / "c.ckpt")
    content = torch.load(path, weights_only=True)
    next(t for name, t in content["state_dict"].items() if name.startswith("network."))[0] = torch.nan
    torch.save(content, path)
    with pytest.raises(FloatingPointError, match=r"c.ckpt: the network's layers\.\d\.weight is infinite or NaN"):
        MetaLearner.load_from_checkpoint(path, network=MLP(hidden=[4]), rule=Reptile(), inner_optimizer=Adam(0.01))


def test_a_learner_survives_the_way_to_another_process() -> None:
    """What `ddp_spawn` does with a trainer, its learner and its data."""
    learner, data = small(), SinusoidDataModule(**DATA)
    run = trainer(2)
    run.fit(learner, datamodule=data)
    other = pickle.loads(pickle.dumps(run))
    assert other.datamodule.trainer is other
    same(weights(other.lightning_module), weights(learner))


def test_figures_of_evaluations_are_no_parts_of_the_learner() -> None:
    """So summaries have no rows for them, and an evaluation of another length or of none needs nothing anew."""
    learner, data = small(), SinusoidDataModule(**DATA)
    run = trainer(2)
    first = run.test(learner, datamodule=data)
    before = learner.eval_schedule
    learner.eval_schedule = replace(before, steps=before.steps + 1)
    run.test(learner, datamodule=data)
    learner.eval_schedule = before
    assert run.test(learner, datamodule=data) == first
    assert [name for name, _ in learner.named_children()] == ["network", "train_losses"]
