"""What replicas refuse."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fomal.callbacks import GradientAlignment
from fomal.data import SinusoidDataModule
from fomal.inner import SGD, SGLD
from fomal.learner.meta_learner import MetaLearner
from fomal.learner.replicas import Replicas
from fomal.models import MLP
from fomal.outer import FOMAML, QueryFOMAML, StepCombination
from fomal.tasks.replicated import ReplicatedDataModule
from tests.helpers.learners import sine_learner, trainer
from tests.helpers.replicas import SEEDS, STEPS, fitted, plain, sine, sines

# -- what is refused


def frozen(seed: int) -> MetaLearner:
    learner = sine(seed)
    learner.network.layers[1].bias.requires_grad_(False)
    return learner


def with_network(network: nn.Module) -> MetaLearner:
    return sine_learner(network=network)


def with_buffer(value: float) -> MetaLearner:
    network = MLP(hidden=(8,))
    network.register_buffer("scale", torch.tensor(value))
    return with_network(network)


def stack(*middle: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(1, 4), *middle, nn.Linear(4, 1))


ALONE = "seeds and step sizes alone may differ"
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "none": (lambda: [], "^replicas are two or more, but learners has 0 entries"),
    "one": (lambda: [sine(0)], "^replicas are two or more, but learners has 1 entries"),
    "adapt": (
        lambda: [sine(0), sine(1, QueryFOMAML(), adapt=["layers.1.*"])],
        "^model.adapt does not work with replicas",
    ),
    "cuda graph": (
        lambda: [sine(0, execution={"cuda_graph": True}), sine(1)],
        "^model.execution.cuda_graph does not work with replicas yet",
    ),
    "skipping": (
        lambda: [sine(0), sine(1, outer={"on_nonfinite": "skip_task"})],
        "^model.outer.on_nonfinite=skip_task does not work with replicas",
    ),
    "noise": (lambda: [sine(0, inner=SGLD()), sine(1, inner=SGLD())], "^SGLD samples noise by episode, .*one by one"),
    "frozen": (lambda: [sine(0), frozen(1)], "^replicas learn all parameters, but layers.1.bias is frozen"),
    "rule": (lambda: [sine(0), sine(1, FOMAML())], f"^replica 1 has another rule than replica 0: {ALONE}"),
    "weights": (
        lambda: [sine(s, StepCombination([0, 1, s])) for s in (1, 2)],
        "^replica 1 has another rule than replica 0",
    ),
    "inner": (
        lambda: [sine(0), sine(1), sine(2, inner=SGD())],
        "^replica 2 has another inner_optimizer than replica 0",
    ),
    "momentum": (
        lambda: [sine(s, inner=SGD(0.1, momentum=s / 10)) for s in (1, 2)],
        "^replica 1 has another inner_optimizer",
    ),
    "shapes": (lambda: [sine(0), with_network(MLP(hidden=(7,)))], "^replica 1 has another network than replica 0"),
    "activation": (
        lambda: [with_network(stack(nn.ReLU())), with_network(stack(nn.Tanh()))],
        "^replica 1 has another network than replica 0",
    ),
    "slope": (
        lambda: [with_network(stack(nn.LeakyReLU(s))) for s in (0.1, 0.2)],
        "^replica 1 has another network than",
    ),
    "buffers": (
        lambda: [with_buffer(1.0), with_buffer(2.0)],
        "^replica 1 has another network's buffers than replica 0",
    ),
    "twice": (lambda: [sine(0)] * 2, "^two replicas share parameters: give each learner a network of its own"),
} | {
    f"{name}={value}": (
        lambda name=name, value=value: [sine(0), sine(1, **{name: value})],
        f"^replica 1 has another {attribute} than",
    )
    for name, attribute, value in (
        ("train", "train_schedule", {"steps": 2}),
        ("train", "train_schedule", {"batch_size": 4}),
        ("train", "train_schedule", {"replacement": True}),
        ("inner_state", "inner_state", "reset"),
        ("eval", "eval_schedule", {"steps": 3}),
        ("eval", "eval_schedule", {"batch_size": 4}),
    )
}


@pytest.mark.parametrize("kind", REFUSED)
def test_learners_that_do_not_fit_together_are_refused(kind: str) -> None:
    make, message = REFUSED[kind]
    with pytest.raises(ValueError, match=message):
        Replicas(make())


def test_data_that_do_not_fit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def use(*args: Any) -> None:
        raise AssertionError("the data have been used")

    monkeypatch.setattr(SinusoidDataModule, "episodes", use)
    replicas = Replicas([plain(seed) for seed in SEEDS])
    message = "^2 replicas need tasks for each: give the trainer a ReplicatedDataModule with as many seeds"
    for data in (sines(), ReplicatedDataModule(sines(), (1, 2, 3))):
        with pytest.raises(ValueError, match=message):
            trainer().fit(replicas, datamodule=data)
    with pytest.raises(ValueError, match="^data.on_device=True does not work with replicas yet"):
        ReplicatedDataModule(sines(on_device=True), SEEDS)
    with pytest.raises(ValueError, match="^seeds is empty: give one for each replica"):
        ReplicatedDataModule(sines(), [])
    with pytest.raises(ValueError, match="^seed=-1 must"):
        ReplicatedDataModule(sines(), [1, -1])


def test_each_learner_is_checked_with_its_data() -> None:
    replicas = Replicas([sine(seed, QueryFOMAML()) for seed in SEEDS])
    with pytest.raises(ValueError, match="^QueryFOMAML needs a query set, but data.train_query_shots=0"):
        trainer().fit(replicas, datamodule=ReplicatedDataModule(sines(train_query_shots=0), SEEDS))
    callbacks = [GradientAlignment(3)]
    with pytest.raises(ValueError, match="^GradientAlignment does not work with replicas: leave one of the two out"):
        trainer(callbacks=callbacks).fit(replicas, datamodule=ReplicatedDataModule(sines(), SEEDS))


def test_a_checkpoint_of_another_kind_is_refused(tmp_path: Path) -> None:
    data = ReplicatedDataModule(sines(), SEEDS)
    make = lambda n: Replicas([plain(seed) for seed in range(n)])  # noqa: E731
    fitted(make(2), data, tmp_path, precision="32-true")
    (tmp_path / "c.ckpt").rename(tmp_path / "two.ckpt")
    fitted(plain(0), sines(), tmp_path, precision="32-true")
    run = trainer(STEPS)
    with pytest.raises(ValueError, match=r"^ckpt_path=.* is a checkpoint of no replicas, not of 2"):
        run.fit(make(2), datamodule=data, ckpt_path=tmp_path / "c.ckpt")
    with pytest.raises(ValueError, match=r"^ckpt_path=.* is a checkpoint of 2 replicas, not of 3"):
        run.fit(make(3), datamodule=ReplicatedDataModule(sines(), range(3)), ckpt_path=tmp_path / "two.ckpt")
    with pytest.raises(ValueError, match=re.escape("the checkpoint is of replicas: give that of one, replica_0/check")):
        run.fit(plain(0), datamodule=sines(), ckpt_path=tmp_path / "two.ckpt")
    with pytest.raises(ValueError, match="^trainer.max_steps=9, but the checkpoint's run has 4"):
        trainer(9).fit(make(2), datamodule=data, ckpt_path=tmp_path / "two.ckpt")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_refused(value: float, tmp_path: Path) -> None:
    replicas, data = Replicas([plain(seed) for seed in SEEDS]), ReplicatedDataModule(sines(), SEEDS)
    fitted(replicas, data, tmp_path, steps=2)
    before = (tmp_path / "c.ckpt").read_bytes()
    with torch.no_grad():
        replicas.learners[1].network.layers[1].bias[0] = value
    message = r"replica 1.*layers\.1\.bias"
    for use in ("fit", "validate", "test", "predict"):
        with pytest.raises(FloatingPointError, match=message):
            getattr(trainer(), use)(replicas, datamodule=data)
    run = trainer()
    run.strategy.connect(replicas)
    with pytest.raises(FloatingPointError, match=message):
        run.save_checkpoint(tmp_path / "c.ckpt")
    assert (tmp_path / "c.ckpt").read_bytes() == before
    replicas.stopped = {1: 2}  # one that has stopped is not looked at
    with pytest.warns(UserWarning, match="task 0, 1, 2 are not finite"):
        trainer().test(replicas, datamodule=data, verbose=False)
