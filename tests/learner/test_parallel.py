"""N processes of T tasks are one process of N T tasks."""

from __future__ import annotations

import json
import os
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy

from fomal.callbacks import ExitOnSigterm, SaveLast
from fomal.cli import main
from fomal.data import SinusoidDataModule
from fomal.evaluation import Accuracy, MacroF1, QueryLoss
from fomal.inner import SGD, Adam
from fomal.learner.preflight import check_trainer
from fomal.outer import FOMAML, MAML, BinomialMAML, QueryFOMAML, Reptile, StepCombination, TruncatedMAML
from fomal.run.provenance import commits, versions
from fomal.utils.processes import launched_processes
from tests.helpers.learners import Blobs, blob_learner, sine_learner, trainer, weights
from tests.helpers.processes import Group
from tests.helpers.sine import tiny_model

RULES = {
    "Reptile, carried Adam": (Reptile(), Adam(0.01)),
    "Reptile, momentum": (Reptile(), SGD(0.02, momentum=0.9)),
    "combination": (StepCombination([0, 1, 1]), SGD(0.02)),
    "FOMAML, separate tail": (FOMAML(tail_shots=1), Adam(0.01)),
    "query FOMAML": (QueryFOMAML(), SGD(0.02)),
    "MAML": (MAML(), SGD(0.02)),
    "truncated MAML": (TruncatedMAML(2), SGD(0.02)),
    "binomial MAML": (BinomialMAML(2), SGD(0.02)),
}


MEASURED = {"metrics": [MacroF1(), Accuracy(), QueryLoss()], "eval": {"report_steps": [0, 2]}}


class CountCollectives(Callback):
    """Counts what is sent to other processes within meta-iterations."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.inside = False
        for name in ("all_reduce", "broadcast", "barrier", "all_gather", "all_gather_object", "reduce", "gather"):
            setattr(dist, name, self.counting(name, getattr(dist, name)))

    def counting(self, name: str, function: Any) -> Any:
        def counted(*args: Any, **settings: Any) -> Any:
            self.counts[name] += self.inside
            return function(*args, **settings)

        return counted

    def on_train_batch_start(self, *args: Any) -> None:
        self.inside = True

    def on_train_end(self, *args: Any) -> None:
        self.inside = False

    on_validation_start = on_train_end


def train(rule: str, precision: str, devices: int, count: Callback | None = None) -> dict[str, Any]:
    """Four meta-iterations of eight tasks, and an evaluation of seven."""
    data = Blobs(train_query_shots=2, meta_batch_size=8, val_tasks=7, test_tasks=7, eval_tasks_per_batch=3)
    outer, inner = RULES[rule]
    # Small steps, since four large ones magnify rounding; and no outer Adam, which divides it by roots near zero.
    step = {"outer": {"optimizer": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.5)}}
    learner = blob_learner(outer, inner, **step, **(MEASURED if rule == "query FOMAML" else {}))
    callbacks = [SaveLast(every_n_meta_iterations=1000), *([count] if count else [])]
    strategy = "ddp" if devices > 1 else "auto"
    settings = {"devices": devices, "strategy": strategy, "precision": precision, "val_check_interval": 2}
    settings["enable_checkpointing"] = True
    run = trainer(4, log_every_n_steps=1, **settings, default_root_dir=os.environ["RUN"], callbacks=callbacks)
    run.fit(learner, datamodule=data)
    results = {"val": dict(learner.results["metrics"]), "logged": dict(run.logged_metrics)}
    run.test(learner, datamodule=data, verbose=False)
    results["test"] = dict(learner.results["metrics"])
    results["by_step"] = {name: value for name, value in learner.results.items() if "_by_step" in name}
    if learner.metrics is not None:
        run.test(learner, datamodule=Blobs(test_tasks=2), verbose=False)  # of four processes two have none
        results["few"] = dict(learner.results["metrics"])
    return {"weights": weights(learner), "carried": learner.carried, "results": results}


def train_all(folder: Path, world: int) -> None:
    os.environ["RUN"] = str(folder / str(world))
    found = {(rule, "64-true"): train(rule, "64-true", world) for rule in RULES}
    found |= {(rule, "32-true"): train(rule, "32-true", world) for rule in ("Reptile, momentum", "query FOMAML")}
    counter = CountCollectives()
    train("Reptile, carried Adam", "32-true", world, counter)
    torch.save((found, dict(counter.counts)), folder / f"{world}-{os.environ.get('RANK', 0)}.pt")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, int], Any]:
    """What each process of 1, 2 and 4 found, by the number of processes and rank."""
    folder = tmp_path_factory.mktemp("trained")
    for world in (1, 2, 4):
        out = folder / f"out{world}"
        out.mkdir()
        group = Group(world, train_all, folder, world, out=out)
        assert group.wait(280) == [0] * world, group.said()
    return {
        (world, rank): torch.load(folder / f"{world}-{rank}.pt", weights_only=False)
        for world in (1, 2, 4)
        for rank in range(world)
    }


def close(a: Any, b: Any, tolerance: float) -> None:
    """Compare nested dicts; relative to the largest value of each tensor, where that is above 1."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            # The interval of equal figures is the root of what rounding leaves of their variance.
            close(a[key], b[key], max(tolerance, 1e-7) if str(key).endswith("_ci95") else tolerance)
    elif a is not None:
        a, b = torch.as_tensor(a, dtype=torch.float64), torch.as_tensor(b, dtype=torch.float64)
        assert (a - b).abs().max() <= tolerance * b.abs().max().clamp_min(1)


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("rule", RULES)
def test_weights_state_and_figures_do_not_depend_on_the_number_of_processes(rule: str, world: int, trained) -> None:
    expected = trained[1, 0][0][rule, "64-true"]
    assert expected["results"]["test"].keys() >= {"test/accuracy", "test/accuracy_transductive", "test/distance"}
    assert ("macro_f1_transductive_by_step" in expected["results"]["by_step"]) == (rule == "query FOMAML")
    for rank in range(world):
        close(trained[world, rank][0][rule, "64-true"], expected, 1e-12)


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("rule", ["Reptile, momentum", "query FOMAML"])
def test_in_32_bits_they_differ_by_rounding(rule: str, world: int, trained) -> None:
    key = (rule, "32-true")
    close(trained[world, 0][0][key]["weights"], trained[1, 0][0][key]["weights"], 2e-6)
    for rank in range(1, world):  # the processes themselves never differ
        close(trained[world, rank][0][key], trained[world, 0][0][key], 0)


@pytest.mark.parametrize("world", [2, 4])
def test_a_meta_iteration_sends_one_message(world: int, trained) -> None:
    for rank in range(world):
        counts = trained[world, rank][1]
        assert {name: number for name, number in counts.items() if number} == {"all_reduce": 4}


# -- evaluation from the command line


def evaluate(folder: Path, world: int) -> None:
    shared = ["--config", str(folder / "config.yaml"), f"--trainer.devices={world}"]
    strategy = "--trainer.strategy=ddp" if world > 1 else "--trainer.strategy=auto"
    for verb in ("test", "predict"):
        for tasks in (7, 1):  # one: a process has none
            place = f"--trainer.default_root_dir={folder}/{world}/{tasks}"
            main([verb, *shared, strategy, place, f"--data.test_tasks={tasks}"])


def test_testing_and_predicting_share_the_tasks_out(tmp_path: Path) -> None:
    config = {
        "model": tiny_model(),
        "data": {"class_path": "fomal.data.SinusoidDataModule", "init_args": {"eval_tasks_per_batch": 2}},
        "trainer": {"accelerator": "cpu", "precision": "64-true", "enable_progress_bar": False},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    for world in (1, 2):
        group = Group(world, evaluate, tmp_path, world, out=tmp_path)
        assert group.wait(60) == [0] * world, group.said()
    for tasks in (7, 1):
        one, two = (tmp_path / world / str(tasks) for world in "12")
        assert (one / "predictions.csv").read_text() == (two / "predictions.csv").read_text()
        expected, found = (json.loads((folder / "results.json").read_text()) for folder in (one, two))
        assert found["tasks"] == expected["tasks"] == tasks
        assert found["metrics"].keys() == expected["metrics"].keys()
        for name, value in expected["metrics"].items():  # null: a single task has no interval
            assert found["metrics"][name] == (value if value is None else pytest.approx(value, rel=1e-12))
        assert found["versions"] == versions()
        assert found["commits"] == commits()


def wait_in_a_test(folder: Path) -> None:
    class Slow(SinusoidDataModule):
        def episodes(self, split: str, number: torch.Tensor) -> Any:
            if number.max() >= 50:  # the first are tried before the test begins
                (folder / f"waiting{os.environ['RANK']}").touch()
            time.sleep(0.05)
            return super().episodes(split, number)

    callbacks = [ExitOnSigterm()]
    run = trainer(devices=2, strategy="ddp", callbacks=callbacks)
    run.test(sine_learner(), datamodule=Slow(test_tasks=10000), verbose=False)


def test_a_test_that_is_asked_to_stop_does(tmp_path: Path) -> None:
    group = Group(2, wait_in_a_test, tmp_path, out=tmp_path, fresh=True)
    while len(list(tmp_path.glob("waiting*"))) < 2:
        assert all(process.is_alive() for process in group.processes), group.said()
        time.sleep(0.05)
    time.sleep(0.3)
    group.send(signal.SIGTERM)
    assert group.wait(20) == [143, 143], group.said()


# -- what is refused


def test_a_launch_that_the_trainer_does_not_see_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    message = r"^WORLD_SIZE=2: .* trainer knows of 1, so each .*: give trainer.devices .* is 2, and .*strategy: ddp\.$"
    with pytest.raises(ValueError, match=message):
        trainer(1).fit(blob_learner(), datamodule=Blobs())
    with pytest.raises(ValueError, match="^WORLD_SIZE=2"):
        trainer(1).test(blob_learner(), datamodule=Blobs())
    monkeypatch.delenv("RANK")  # Lightning's own launcher sets WORLD_SIZE alone
    assert launched_processes() == ("", 1)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "3")
    with pytest.raises(ValueError, match="^SLURM_STEP_NUM_TASKS=3"):
        trainer(1).fit(blob_learner(), datamodule=Blobs())


@pytest.mark.parametrize(
    ("tasks", "world", "nearest"), [(5, 2, "4 or 6"), (5, 4, "4 or 8"), (3, 4, "4"), (7, 3, "6 or 9")]
)
def test_a_meta_batch_that_does_not_divide_is_refused_with_the_nearest_that_do(
    tasks: int, world: int, nearest: str
) -> None:
    data = Blobs(meta_batch_size=tasks)
    message = f"^data.meta_batch_size={tasks} does not divide over {world} processes: use {nearest}, or another number"
    with pytest.raises(ValueError, match=message):
        data.check_processes(world)
    for size in map(int, nearest.split(" or ")):
        Blobs(meta_batch_size=size).check_processes(world)


def disagree(kind: str) -> None:
    rank = int(os.environ["RANK"])
    data = Blobs(seed=rank) if kind == "seed" else Blobs(meta_batch_size=5 if kind == "size" else 4)
    learner = blob_learner()
    if kind == "config":
        learner.config = {"model": {"train": {"steps": 3 + rank}}}
    run = trainer(4, devices=2, strategy="ddp")
    if kind == "start" and rank:
        run.fit_loop.epoch_loop.manual_optimization.optim_step_progress.total.completed = 2
    run.fit(learner, datamodule=data)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("seed", "the processes differ in the seed of the data: 0 in process 0, 1 in process 1"),
        (
            "config",
            "the processes differ in model: {'train': {'steps': 3}} in process 0, {'train': {'steps': 4}} in process 1",
        ),
        ("start", "the processes differ in the meta-iteration they go on from: 0 in process 0, 2 in process 1"),
        ("size", "data.meta_batch_size=5 does not divide over 2 processes: use 4 or 6"),
    ],
)
def test_processes_that_differ_are_refused(kind: str, message: str, tmp_path: Path) -> None:
    group = Group(2, disagree, kind, out=tmp_path)
    assert group.wait(60) == [1, 1]
    for log in group.logs:
        assert f"ValueError: {message}" in log.read_text()


def test_strategies_that_shard_parameters_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    run = trainer(1)
    monkeypatch.setattr(type(run), "strategy", FSDPStrategy())
    message = r"^trainer.strategy=FSDPStrategy keeps a part of the parameters on each device, .*: use ddp"
    with pytest.raises(ValueError, match=message):
        check_trainer(run)
    monkeypatch.setattr(type(run), "strategy", DDPStrategy())
    check_trainer(run)
