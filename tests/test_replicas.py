"""Replicas, runs side by side in one program, are the runs that they would be alone."""

from __future__ import annotations

import csv
import math
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from fomal.callbacks import AdaptationFigure, EpisodeGrid, GradientAlignment, ReplicaFiles, ResultsFile, SaveLast
from fomal.data import SinusoidDataModule
from fomal.data.replicated import ReplicatedDataModule
from fomal.inner import SGD, SGLD, Adam
from fomal.learner import MetaLearner
from fomal.metrics import student_interval
from fomal.models import MLP, Conv4
from fomal.outer import FOMAML, MAML, BinomialMAML, QueryFOMAML, Reptile, StepCombination, TruncatedMAML
from fomal.replicas import Replicas, replica_checkpoint
from tests.processes import Group
from tests.test_learner import Blobs, blob_learner, sine_learner, smooth_learner, trainer

SEEDS = (3, 5)
STEPS = 4
Make = Callable[[int], MetaLearner]


def close(a: Any, b: Any, tolerance: float, where: str = "") -> None:
    """Compare nested values; floating-point ones relative to the largest of each tensor."""
    if isinstance(a, torch.Tensor | float):
        a, b = torch.as_tensor(a), torch.as_tensor(b)
        assert (a.dtype, a.shape) == (b.dtype, b.shape), where
        if tolerance and a.is_floating_point() and a.numel():
            assert (a - b).abs().max() <= tolerance * b.abs().max(), f"{where}: off by {(a - b).abs().max():.1e}"
        else:
            assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            close(a[key], b[key], tolerance, f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for place, (x, y) in enumerate(zip(a, b, strict=True)):
            close(x, y, tolerance, f"{where}[{place}]")
    else:
        assert a == b, where


def outer(lr: float = 0.3) -> Any:
    return lambda p: torch.optim.SGD(p, lr=lr, momentum=0.5)


def sine(seed: int, rule: Any = None, inner: Any = None, **settings: Any) -> MetaLearner:
    torch.manual_seed(seed)
    return sine_learner(rule, inner, MLP(hidden=(8,)), **{"outer_optimizer": outer(), **settings})


def plain(seed: int, **settings: Any) -> MetaLearner:
    return sine(seed, recorded=False, **settings)


def sines(**settings: Any) -> SinusoidDataModule:
    defaults = {"train_shots": 10, "train_query_shots": 3, "meta_batch_size": 4, "val_tasks": 3, "test_tasks": 3}
    return SinusoidDataModule(**{**defaults, **settings})


def blobs(**settings: Any) -> Blobs:
    return Blobs(**{"train_query_shots": 2, "val_tasks": 3, "test_tasks": 3, **settings})


def fitted(model: Any, data: Any, folder: Path, steps: int = STEPS, **settings: Any) -> dict[str, Any]:
    """The checkpoint of a run."""
    defaults = {"precision": "64-true", "val_check_interval": 2, "log_every_n_steps": 2}
    run = trainer(steps, **{**defaults, **settings})
    run.fit(model, datamodule=data)
    run.save_checkpoint(folder / "c.ckpt")
    return torch.load(folder / "c.ckpt", weights_only=True)


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


# Recording takes longer than the run.
@pytest.mark.parametrize(
    ("name", "recorded"),
    [
        *((name, False) for name in RULES),
        pytest.param("Reptile, Adam", None, marks=pytest.mark.recorded),
        pytest.param("query FOMAML", None, marks=pytest.mark.recorded),
    ],
)
def test_a_replica_is_the_run_alone(name: str, recorded: bool | None, tmp_path: Path) -> None:
    rule, inner = RULES[name]
    make = lambda place: sine(SEEDS[place], rule, inner, recorded=recorded)  # noqa: E731
    assert_equal(make, sines, tmp_path, 1e-12)


IMAGES = {
    "Reptile, momentum": (Reptile(), SGD(0.05, momentum=0.5)),
    "FOMAML, separate tail": (FOMAML(tail_shots=1), SGD(0.05)),
    "query FOMAML": (QueryFOMAML(), SGD(0.05)),
    "MAML": (MAML(), SGD(0.05)),
    "binomial MAML": (BinomialMAML(1), SGD(0.05)),
}


def conv(seed: int, rule: Any, inner: Any, **settings: Any) -> MetaLearner:
    torch.manual_seed(seed)
    network = Conv4(3, image_size=9, filters=4)
    return blob_learner(rule, inner, network, outer_optimizer=outer(), **settings)


@pytest.mark.parametrize(
    ("name", "recorded"),
    [*((name, False) for name in IMAGES), pytest.param("Reptile, momentum", None, marks=pytest.mark.recorded)],
)
def test_a_replica_is_the_run_alone_on_images(name: str, recorded: bool | None, tmp_path: Path) -> None:
    make = lambda place: conv(SEEDS[place], *IMAGES[name], recorded=recorded)  # noqa: E731
    assert_equal(make, blobs, tmp_path, 1e-9, steps=3, limit_val_batches=0 if recorded is None else 1.0)


def test_in_32_bits_a_replica_differs_by_rounding(tmp_path: Path) -> None:
    make = lambda place: conv(SEEDS[place], Reptile(), SGD(0.05), recorded=False)  # noqa: E731
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
    ("name", "recorded"),
    [*((name, False) for name in STEP_SIZES), pytest.param("Reptile, Adam", None, marks=pytest.mark.recorded)],
)
def test_step_sizes_may_differ(name: str, recorded: bool | None, tmp_path: Path) -> None:
    rule, inner = STEP_SIZES[name]

    def make(place: int) -> MetaLearner:
        return sine(3, rule, inner((0.02, 0.005)[place]), recorded=recorded, outer_optimizer=outer((0.3, 0.1)[place]))

    assert_equal(make, sines, tmp_path, 1e-12)


@pytest.mark.parametrize(
    ("model", "data"),
    [
        ({"meta_iterations_per_step": 2}, {}),
        ({"tasks_per_chunk": 2}, {}),
        ({"tasks_per_chunk": 3, "inner_state": "reset"}, {}),
        ({"vectorize": False}, {}),
        ({"meta_iterations_per_step": 2}, {"num_workers": 2}),
    ],
)
def test_how_it_is_computed_does_not_matter(model: dict[str, Any], data: dict[str, Any], tmp_path: Path) -> None:
    def make(place: int, **settings: Any) -> MetaLearner:
        return sine(SEEDS[place], inner=SGD((0.02, 0.01)[place], momentum=0.5), recorded=False, **settings)

    plain = {key: value for key, value in model.items() if key == "inner_state"}
    expected = alone(lambda place: make(place, **plain), sines, tmp_path)
    found = together(lambda place: make(place, **model), lambda **seed: sines(**data, **seed), tmp_path)
    for (content, results), (content_alone, results_alone) in zip(found, expected, strict=True):
        close(content, content_alone, 1e-12)
        close(results, results_alone, 1e-6)


def in_processes(world: int, folder: Path) -> None:
    settings = {"devices": world, "strategy": "ddp" if world > 1 else "auto"}
    make = lambda place: sine(SEEDS[place], QueryFOMAML(), SGD((0.02, 0.01)[place], momentum=0.9), recorded=False)  # noqa: E731
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


# -- figures


def rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_the_runs_log_has_means_over_the_replicas(tmp_path: Path) -> None:
    learners = [plain(seed) for seed in SEEDS]
    callbacks = [ReplicaFiles(), AdaptationFigure(), ModelCheckpoint(tmp_path / "best", monitor="val/loss")]
    run = trainer(
        8,
        logger=CSVLogger(tmp_path, name="", version="run"),
        callbacks=callbacks,
        log_every_n_steps=2,
        val_check_interval=4,
        enable_checkpointing=True,
    )
    run.fit(Replicas(learners), datamodule=ReplicatedDataModule(sines(), SEEDS))
    whole, *each = (rows(tmp_path / "run" / part / "metrics.csv") for part in ("", "replica_0", "replica_1"))
    assert [int(row["step"]) for row in whole] == [2, 4, 4, 6, 8, 8]
    for mean, *own in zip(whole, *each, strict=True):
        assert mean.keys() == own[0].keys()
        assert sum(map(bool, mean.values())) in (4, 7)
        for name, value in mean.items():
            if value:
                assert float(value) == pytest.approx(statistics.fmean(float(row[name]) for row in own), rel=1e-12)
    for place in range(2):
        assert (tmp_path / "run" / f"replica_{place}" / "adaptation.png").is_file()
    best = torch.load(next((tmp_path / "best").glob("*.ckpt")), weights_only=True)
    assert len(best["fomal"]["replicas"]) == 2


def test_each_has_a_picture_of_a_task(tmp_path: Path) -> None:
    learners = [conv(seed, Reptile(), SGD(0.05), recorded=False) for seed in SEEDS]
    run = trainer(2, default_root_dir=tmp_path, callbacks=[EpisodeGrid()], val_check_interval=2)
    run.fit(Replicas(learners), datamodule=ReplicatedDataModule(blobs(), SEEDS))
    pictures = [(tmp_path / f"replica_{place}" / "episode.png").read_bytes() for place in range(2)]
    assert pictures[0] != pictures[1]
    assert not (tmp_path / "episode.png").exists()


# Student's quantiles at 0.975 as tabulated.
QUANTILES = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262, 10: 2.228}
QUANTILES |= {11: 2.201, 12: 2.179, 15: 2.131, 20: 2.086, 25: 2.060, 30: 2.042, 60: 2.000, 120: 1.980, 1000: 1.962}


@pytest.mark.parametrize("degrees", QUANTILES)
def test_the_interval_is_students(degrees: int) -> None:
    values = [float((7 * i * i) % 11) for i in range(degrees + 1)]
    mean, half = student_interval(values)
    assert mean == pytest.approx(sum(values) / len(values))
    deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / degrees)
    assert half == pytest.approx(QUANTILES[degrees] * deviation / math.sqrt(len(values)), rel=3e-4)


def test_one_value_has_no_interval() -> None:
    mean, half = student_interval([2.5])
    assert mean == 2.5
    assert math.isnan(half)


# -- values that are not finite


def jumping(seed: int, at: int | None) -> MetaLearner:
    """A learner whose outer step size is 1e30 in meta-iteration `at` + 1."""
    return plain(
        seed,
        inner=SGD(0.02, momentum=0.5),
        outer_schedule=lambda o: LambdaLR(o, lambda step: 1e30 if step == at else 1.0),
    )


def diverging(folder: Path, at: int | None) -> tuple[Replicas, dict[str, Any]]:
    """Three replicas, of which the second jumps."""
    replicas = Replicas([jumping(seed, at if seed == 1 else None) for seed in range(3)])
    run = trainer(
        12,
        logger=CSVLogger(folder, name="", version="run"),
        enable_checkpointing=True,
        callbacks=[ReplicaFiles(), SaveLast(4)],
        log_every_n_steps=2,
        val_check_interval=4,
    )
    run.fit(replicas, datamodule=ReplicatedDataModule(sines(), range(3)))
    return replicas, torch.load(folder / "run" / "checkpoints" / "last.ckpt", weights_only=True)


def test_a_replica_that_diverges_stops_and_the_others_go_on(
    tmp_path: Path, recwarn: pytest.WarningsRecorder, capsys: pytest.CaptureFixture[str]
) -> None:
    _, expected = diverging(tmp_path / "good", None)
    replicas, found = diverging(tmp_path / "bad", 5)
    assert replicas.stopped == found["fomal"]["stopped"] == {1: 7}
    said = [str(w.message) for w in recwarn if "replica" in str(w.message)]
    assert said == [
        "replica 1 stops at meta-iteration 7, where its loss, gradient or inner state is not finite; the others go "
        "on. Lower its step sizes."
    ]
    good, bad = tmp_path / "good" / "run", tmp_path / "bad" / "run"
    for place in (0, 2):
        close(replica_checkpoint(found, place), replica_checkpoint(expected, place), 0)
        log = f"replica_{place}/metrics.csv"
        assert (bad / log).read_text() == (good / log).read_text()
    own = torch.load(bad / "replica_1" / "checkpoints" / "last.ckpt", weights_only=True)
    before = torch.load(good / "replica_1" / "checkpoints" / "previous.ckpt", weights_only=True)
    assert own["global_step"] == 4
    assert before["global_step"] == 8
    assert [row["step"] for row in rows(bad / "replica_1" / "metrics.csv")] == ["2", "4", "4", "6"]
    for mean, *others in zip(
        *(rows(bad / part / "metrics.csv")[4:] for part in ("", "replica_0", "replica_2")), strict=False
    ):
        assert int(mean["step"]) >= 8
        for name in filter(mean.get, mean):
            assert float(mean[name]) == pytest.approx(statistics.fmean(float(row[name]) for row in others), rel=1e-12)
    # What is read back knows of it; a test has no results of it.
    again = Replicas([jumping(seed, None) for seed in range(3)])
    test = trainer(callbacks=[ResultsFile()])
    ckpt_path = bad / "checkpoints" / "last.ckpt"
    test.test(again, datamodule=ReplicatedDataModule(sines(), range(3)), ckpt_path=ckpt_path, verbose=False)
    assert again.stopped == {1: 7}
    assert [(bad / f"replica_{place}" / "results.json").is_file() for place in range(3)] == [True, False, True]
    assert "2 replicas, 3 tasks each" in capsys.readouterr().out


def test_a_replica_may_diverge_at_once(tmp_path: Path) -> None:
    make = lambda place: plain(SEEDS[place], inner=SGD((0.02, 1e30)[place]))  # noqa: E731
    replicas = Replicas([make(0), make(1)])
    callbacks = [ReplicaFiles(), SaveLast(2)]
    run = trainer(4, default_root_dir=tmp_path, callbacks=callbacks, enable_checkpointing=True, val_check_interval=2)
    with pytest.warns(UserWarning, match="replica 1 stops at meta-iteration 1,"):
        run.fit(replicas, datamodule=ReplicatedDataModule(sines(), SEEDS))
    assert run.global_step == 4
    assert not (tmp_path / "replica_1" / "checkpoints").exists()
    expected = fitted(make(0), sines(seed=SEEDS[0]), tmp_path, precision="32-true")
    close(
        replicas.learners[0].network.state_dict(),
        {name.removeprefix("network."): t for name, t in expected["state_dict"].items() if name.startswith("network.")},
        1e-5,
    )
    for name, p in make(1).network.named_parameters():
        assert torch.equal(p, replicas.learners[1].network.get_parameter(name))


def test_a_run_ends_where_no_replica_is_left(tmp_path: Path) -> None:
    replicas = Replicas([plain(seed, inner=SGD(1e30)) for seed in SEEDS])
    with (
        pytest.warns(UserWarning, match="replica . stops at meta-iteration 1,"),
        pytest.raises(FloatingPointError, match="^meta-iteration 1: no replica is left whose values are finite: lower"),
    ):
        trainer(4).fit(replicas, datamodule=ReplicatedDataModule(sines(), SEEDS))


# -- files


def test_an_earlier_run_in_the_same_folder_is_kept(tmp_path: Path) -> None:
    def once(steps: int) -> None:
        callbacks = [ReplicaFiles(), SaveLast(2)]
        logger = CSVLogger(tmp_path, name="", version="run")
        run = trainer(steps, logger=logger, callbacks=callbacks, enable_checkpointing=True, log_every_n_steps=1)
        run.fit(Replicas([plain(seed) for seed in SEEDS]), datamodule=ReplicatedDataModule(sines(), SEEDS))

    once(3)
    own = tmp_path / "run" / "replica_1"
    files = ["checkpoints/last.ckpt", "checkpoints/previous.ckpt", "metrics.csv"]
    before = [(own / name).read_bytes() for name in files]
    once(5)
    kept = ["checkpoints/last_1.ckpt", "checkpoints/previous_1.ckpt", "metrics_1.csv"]
    assert [(own / name).read_bytes() for name in kept] == before
    assert torch.load(own / files[0], weights_only=True)["global_step"] == 5
    assert len(rows(own / "metrics.csv")) == 5


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
    "cuda graph": (lambda: [sine(0, cuda_graph=True), sine(1)], "^model.cuda_graph does not work with replicas yet"),
    "skipping": (
        lambda: [sine(0), sine(1, on_nonfinite="skip_task")],
        "^model.on_nonfinite=skip_task does not work with replicas",
    ),
    "noise": (lambda: [sine(0, inner=SGLD()), sine(1, inner=SGLD())], "^SGLD draws noise by episode, .*one by one"),
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
    name: (lambda name=name, value=value: [sine(0), sine(1, **{name: value})], f"^replica 1 has another {name} than")
    for name, value in {
        "inner_steps": 2,
        "inner_batch_size": 4,
        "inner_replacement": True,
        "inner_state": "reset",
        "eval_inner_steps": 3,
        "eval_inner_batch_size": 4,
        "meta_iterations_per_step": 2,
    }.items()
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
    with pytest.raises(ValueError, match="^ckpt_path is a checkpoint of no replicas, not of 2"):
        run.fit(make(2), datamodule=data, ckpt_path=tmp_path / "c.ckpt")
    with pytest.raises(ValueError, match="^ckpt_path is a checkpoint of 2 replicas, not of 3"):
        run.fit(make(3), datamodule=ReplicatedDataModule(sines(), range(3)), ckpt_path=tmp_path / "two.ckpt")
    with pytest.raises(ValueError, match=re.escape("the checkpoint is of replicas: give that of one, replica_0/check")):
        run.fit(plain(0), datamodule=sines(), ckpt_path=tmp_path / "two.ckpt")
    with pytest.raises(ValueError, match="^trainer.max_steps=9, but the checkpoint's run has 4"):
        trainer(9).fit(make(2), datamodule=data, ckpt_path=tmp_path / "two.ckpt")


def test_pinned_tasks_of_all_replicas_stay_apart_from_a_chunk() -> None:
    data = ReplicatedDataModule(blobs(), SEEDS)
    data.setup("fit")
    batch = data.episodes("train", torch.arange(4))
    for pinned in (batch, list(batch)):  # torch before 2.12 makes lists of tuples
        found = data.on_after_batch_transfer(pinned, 0)
        assert isinstance(found, tuple)
        assert [episode.seed for episode in found] == list(SEEDS)
        assert found[0].support_x.is_floating_point()
    chunk = data.on_after_batch_transfer([list(batch), list(batch)], 0)
    assert isinstance(chunk, list)
    assert all(isinstance(part, tuple) for part in chunk)


def test_logs_of_a_trial_are_not_written(tmp_path: Path) -> None:
    callbacks = [ReplicaFiles(), SaveLast(1)]
    run = trainer(4, fast_dev_run=2, default_root_dir=tmp_path, callbacks=callbacks, enable_checkpointing=True)
    run.fit(Replicas([plain(seed) for seed in SEEDS]), datamodule=ReplicatedDataModule(sines(), SEEDS))
    assert run.global_step == 2
    assert not list(tmp_path.rglob("*"))
