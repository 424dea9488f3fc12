"""Replicas, runs side by side in one program, are the runs that they would be alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fomal.inner import SGD, Adam
from fomal.learner.meta_learner import MetaLearner
from fomal.learner.replicas import Replicas, replica_checkpoint
from fomal.outer import FOMAML, MAML, BinomialMAML, QueryFOMAML, Reptile, StepCombination, TruncatedMAML
from fomal.tasks.replicated import ReplicatedDataModule
from tests.helpers.learners import smooth_learner
from tests.helpers.processes import Group
from tests.helpers.replicas import SEEDS, blobs, close, conv, fitted, outer, plain, sine, sines

Make = Callable[[int], MetaLearner]


def alone(make: Make, data: Any, folder: Path, **settings: Any) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Checkpoint and validation results of each run by itself."""
    found = []
    for place, seed in enumerate(SEEDS):
        learner = make(place)
        found.append((fitted(learner, data(seed=seed), folder, **settings), learner.results))
    return found


def together(make: Make, data: Any, folder: Path, **settings: Any) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """The same of the runs side by side."""
    learners = [make(place) for place in range(len(SEEDS))]
    content = fitted(Replicas(learners), ReplicatedDataModule(data(), SEEDS), folder, **settings)
    return [(replica_checkpoint(content, place), learner.results) for place, learner in enumerate(learners)]


def assert_equal(make: Make, data: Any, folder: Path, tolerance: float, **settings: Any) -> None:
    """Everything in the checkpoints: weights, both optimisers, schedule, carried state, losses, Lightning's counts."""
    expected, found = alone(make, data, folder, **settings), together(make, data, folder, **settings)
    # The root in an interval, and the square in its variance, magnify rounding.
    for (content, results), (content_alone, results_alone) in zip(found, expected, strict=True):
        close(content, content_alone, tolerance)
        close(results, results_alone, max(1e-6, 100 * tolerance))
    assert not torch.equal(*(next(iter(content["state_dict"].values())) for content, _ in found))  # seeds differ


# -- each replica is the run alone

RULES: dict[str, tuple[Any, Any]] = {
    "Reptile, Adam": (Reptile(), Adam(0.01)),
    "Reptile, Adam with momentum": (Reptile(), Adam(0.01, beta1=0.9, weight_decay=0.01)),
    "Reptile, momentum": (Reptile(), SGD(0.02, momentum=0.9, weight_decay=0.01)),
    "FOMAML, separate tail": (FOMAML(tail_shots=2), Adam(0.01)),
    "query FOMAML": (QueryFOMAML(), SGD(0.02, momentum=0.9)),
    "MAML": (MAML(), SGD(0.02, momentum=0.9)),
    "MAML, Adam": (MAML(), Adam(0.01, eps_root=1e-6)),
    "truncated MAML": (TruncatedMAML(2), SGD(0.02)),
    "binomial MAML": (BinomialMAML(2), SGD(0.02)),
    "combination": (StepCombination([0, 1, 1]), SGD(0.02)),
}


# Trace takes longer than the run.
@pytest.mark.parametrize(
    ("name", "traced"),
    [
        *((name, False) for name in RULES),
        pytest.param("Reptile, Adam", None, marks=pytest.mark.traced),
        pytest.param("query FOMAML", None, marks=pytest.mark.traced),
    ],
)
def test_a_replica_is_the_run_alone(name: str, traced: bool | None, tmp_path: Path) -> None:
    rule, inner = RULES[name]
    make = lambda place: sine(SEEDS[place], rule, inner, execution={"traced": traced})  # noqa: E731
    assert_equal(make, sines, tmp_path, 1e-12)


IMAGES = {
    "Reptile, momentum": (Reptile(), SGD(0.05, momentum=0.5)),
    "FOMAML, separate tail": (FOMAML(tail_shots=1), SGD(0.05)),
    "query FOMAML": (QueryFOMAML(), SGD(0.05)),
    "MAML": (MAML(), SGD(0.05)),
    "binomial MAML": (BinomialMAML(1), SGD(0.05)),
}


@pytest.mark.parametrize(
    ("name", "traced"),
    [*((name, False) for name in IMAGES), pytest.param("Reptile, momentum", None, marks=pytest.mark.traced)],
)
def test_a_replica_is_the_run_alone_on_images(name: str, traced: bool | None, tmp_path: Path) -> None:
    make = lambda place: conv(SEEDS[place], *IMAGES[name], execution={"traced": traced})  # noqa: E731
    assert_equal(make, blobs, tmp_path, 1e-9, steps=3, limit_val_batches=0 if traced is None else 1.0)


def test_in_32_bits_a_replica_differs_by_rounding(tmp_path: Path) -> None:
    make = lambda place: conv(SEEDS[place], Reptile(), SGD(0.05), execution={"traced": False})  # noqa: E731
    expected, found = (kind(make, blobs, tmp_path, steps=3, precision="32-true") for kind in (alone, together))
    for (content, _), (content_alone, _) in zip(found, expected, strict=True):
        close(content["state_dict"], content_alone["state_dict"], 1e-5)


# Where gradients are zero, as below a ReLU, Adam makes steps of rounding; so no ReLU.
def test_adam_on_images(tmp_path: Path) -> None:
    def make(place: int) -> MetaLearner:
        learner = smooth_learner(Reptile(), Adam(0.01))
        torch.manual_seed(SEEDS[place])
        nn.init.normal_(learner.network[4].weight, std=0.1)
        return learner

    assert_equal(make, blobs, tmp_path, 1e-9)


STEP_SIZES = {
    "Reptile, momentum": (Reptile(), lambda lr: SGD(lr, momentum=0.9, weight_decay=0.01)),
    "Reptile, Adam": (Reptile(), Adam),
    "MAML": (MAML(), SGD),
    "MAML, Adam": (MAML(), lambda lr: Adam(lr, beta1=0.5, eps_root=1e-6)),
    "binomial MAML": (BinomialMAML(3), SGD),
}


@pytest.mark.parametrize(
    ("name", "traced"),
    [*((name, False) for name in STEP_SIZES), pytest.param("Reptile, Adam", None, marks=pytest.mark.traced)],
)
def test_step_sizes_may_differ(name: str, traced: bool | None, tmp_path: Path) -> None:
    rule, inner = STEP_SIZES[name]

    def make(place: int) -> MetaLearner:
        return sine(
            3,
            rule,
            inner((0.02, 0.005)[place]),
            execution={"traced": traced},
            outer={"optimizer": outer((0.3, 0.1)[place])},
        )

    assert_equal(make, sines, tmp_path, 1e-12)


@pytest.mark.parametrize(
    ("model", "data"),
    [
        ({"execution": {"tasks_per_chunk": 2}}, {}),
        ({"execution": {"tasks_per_chunk": 3}, "inner_state": "reset"}, {}),
        ({"execution": {"vectorize": False}}, {}),
        ({}, {"num_workers": 2}),
    ],
)
def test_how_it_is_computed_does_not_matter(model: dict[str, Any], data: dict[str, Any], tmp_path: Path) -> None:
    def make(place: int, **settings: Any) -> MetaLearner:
        return plain(SEEDS[place], inner=SGD((0.02, 0.01)[place], momentum=0.5), **settings)

    same = {key: value for key, value in model.items() if key == "inner_state"}
    expected = alone(lambda place: make(place, **same), sines, tmp_path)
    found = together(lambda place: make(place, **model), lambda **seed: sines(**data, **seed), tmp_path)
    for (content, results), (content_alone, results_alone) in zip(found, expected, strict=True):
        close(content, content_alone, 1e-12)
        close(results, results_alone, 1e-6)


def in_processes(world: int, folder: Path) -> None:
    settings = {"devices": world, "strategy": "ddp" if world > 1 else "auto"}
    make = lambda place: plain(SEEDS[place], rule=QueryFOMAML(), inner=SGD((0.02, 0.01)[place], momentum=0.9))  # noqa: E731
    found = together(make, sines, folder, **settings)
    torch.save(found, folder / f"found{world}.pt")


def test_two_processes_are_one(tmp_path: Path) -> None:
    group = Group(2, in_processes, 2, tmp_path, out=tmp_path)
    in_processes(1, tmp_path)
    assert group.wait(100) == [0, 0], group.said()
    one, two = (torch.load(tmp_path / f"found{world}.pt") for world in (1, 2))
    for (content, results), (content_one, results_one) in zip(two, one, strict=True):
        for key in ("state_dict", "optimizer_states", "lr_schedulers", "loops", "fomal"):
            close(content[key], content_one[key], 1e-12, key)
        close(results, results_one, 1e-6)


def test_pinned_tasks_of_all_replicas_are_a_tuple() -> None:
    data = ReplicatedDataModule(blobs(), SEEDS)
    data.setup("fit")
    batch = data.episodes("train", torch.arange(4))
    for pinned in (batch, list(batch)):  # torch before 2.12 makes lists of tuples
        found = data.on_after_batch_transfer(pinned, 0)
        assert isinstance(found, tuple)
        assert [episode.seed for episode in found] == list(SEEDS)
        assert found[0].support_x.is_floating_point()
