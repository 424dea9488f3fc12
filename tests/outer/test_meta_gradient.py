"""Meta-batches in chunks, and tasks whose numbers are not finite: named, or left out of the mean; never averaged in."""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from fomal.callbacks import SaveLast
from fomal.data import SinusoidDataModule
from fomal.engine.chunking import Chunks
from fomal.inner import SGD, SGLD, Adam
from fomal.outer import FOMAML, MAML, BinomialMAML, QueryFOMAML, Reptile, StepCombination, TruncatedMAML
from fomal.outer.meta_gradient import bad_tasks, meta_gradient
from tests.helpers.groups import merged
from tests.helpers.learners import Blobs, assert_same, blob_learner, sine_learner, trainer, weights
from tests.helpers.poisoned import Poisoned
from tests.helpers.processes import Group

RULES = [Reptile(), QueryFOMAML(), MAML(), TruncatedMAML(1), BinomialMAML(1)]


def inner_loop(learner: Any, data: Poisoned) -> Any:
    return learner.inner_loop(data.episodes("train", torch.arange(4)).floating(torch.float64), training=True)


def close(found: Any, expected: Any, tolerance: float) -> None:
    """By the norm of each tensor."""
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert (a - b).norm() <= tolerance * b.norm()


SINE = [(rule, SGD(0.01), {}) for rule in (Reptile(), FOMAML(), QueryFOMAML(), BinomialMAML(2))]
SINE += [(rule, SGD(0.01, momentum=0.9), {"adapt": ["*.bias"]}) for rule in (QueryFOMAML(), MAML())]
SINE += [(Reptile(), SGLD(0.01, temperature=0.1), {}), (MAML(), SGD(0.01), {"execution": {"vectorize": False}})]
MOMENTS = Adam(0.01, beta1=0.5, eps_root=1e-4)
BOTH = [(rule, MOMENTS, {}) for rule in (FOMAML(tail_shots=2), MAML(), TruncatedMAML(2), StepCombination([0, 1, 2]))]
CASES = [(sine_learner, *case) for case in SINE + BOTH] + [(blob_learner, *case) for case in BOTH]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-4)], ids=str)
@pytest.mark.parametrize(("make", "rule", "optimizer", "settings"), CASES, ids=lambda value: type(value).__name__)
def test_chunks_give_what_all_tasks_at_once_give(
    make: Any, rule: Any, optimizer: Any, settings: Any, dtype: Any, tolerance: float
) -> None:
    """From a carried state, which the second meta-batch starts from."""
    learner = make(rule, optimizer, **merged({"execution": {"vectorize": True}}, settings)).to(dtype)
    data: Any = SinusoidDataModule(train_query_shots=5) if make is sine_learner else Blobs(train_query_shots=2)
    data.setup("fit")
    inner = prepared(learner, data, range(5))
    learner.carried = meta_gradient(rule, inner, learner.initialisation(), skip=False).state or None
    inner, phi = prepared(learner, data, range(5, 10)), learner.initialisation()
    expected = meta_gradient(rule, inner, phi, skip=False)
    for size in (1, 2, 3):
        found = meta_gradient(rule, inner, phi, skip=False, chunks=Chunks(size))
        assert found.gradient.keys() == expected.gradient.keys()
        close(found.tensors(), expected.tensors(), tolerance)
        assert found.state.get("shared") == expected.state.get("shared")
        assert (found.weight, found.skipped) == (1, 0)
    at_once = meta_gradient(rule, inner, phi, skip=False, chunks=Chunks(5))
    assert all(torch.equal(a, b) for a, b in zip(at_once.tensors(), expected.tensors(), strict=True))


def prepared(learner: Any, data: Any, tasks: range) -> Any:
    episode = data.on_after_batch_transfer(data.episodes("train", torch.tensor(tasks)), 0)
    return learner.inner_loop(episode, training=True)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_tasks_are_left_out_in_chunks_too(size: int) -> None:
    rule, learner = MAML(), sine_learner(MAML(), SGD(0.01, momentum=0.5)).double()
    inner, phi = inner_loop(learner, Poisoned({2})), learner.initialisation()
    expected = meta_gradient(rule, inner, phi, skip=True)
    found = meta_gradient(rule, inner, phi, skip=True, chunks=Chunks(size))
    close(found.tensors(), expected.tensors(), 1e-12)
    assert (float(found.weight), int(found.skipped)) == (0.75, 1)


@pytest.mark.parametrize("make", [sine_learner, blob_learner], ids=lambda make: make.__name__)
def test_a_run_in_chunks_is_the_run(make: Any) -> None:
    """Training, validation and test."""
    found: list[Any] = []
    for size in (None, 4, 3):
        learner = make(QueryFOMAML(), SGD(0.05, momentum=0.5), execution={"tasks_per_chunk": size})
        settings = {"meta_batch_size": 4, "train_query_shots": 2, "val_tasks": 4, "test_tasks": 5}
        data: Any = SinusoidDataModule(**settings) if make is sine_learner else Blobs(**settings)
        run = trainer(3, precision="64-true", val_check_interval=1)
        run.fit(learner, datamodule=data)
        run.test(learner, datamodule=data, verbose=False)
        found.append((weights(learner), learner.carried["momentum"], learner.results["metrics"]))
    assert_same(found[0][0], found[1][0])
    close(list(found[2][0].values()), list(found[0][0].values()), 1e-12)
    close(list(found[2][1].values()), list(found[0][1].values()), 1e-12)
    assert found[2][2] == pytest.approx(found[0][2], rel=1e-9)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
def test_the_mean_is_that_of_the_finite_tasks(rule: Any) -> None:
    learner = sine_learner(rule, SGD(0.01, momentum=0.5) if isinstance(rule, Reptile) else SGD(0.01)).double()
    inner, phi = inner_loop(learner, Poisoned({1, 2})), learner.initialisation()
    assert bad_tasks(rule, inner, phi) == [1, 2]
    found = meta_gradient(rule, inner, phi, skip=True)
    assert (float(found.weight), int(found.skipped)) == (0.5, 2)
    clean = inner_loop(learner, Poisoned(set()))
    alone = [rule(part(clean, t), phi) for t in (0, 3)]
    for name, value in found.gradient.items():
        torch.testing.assert_close(value, (alone[0][0][name] + alone[1][0][name]) / 2, rtol=1e-12, atol=1e-14)
    for kind, values in found.state.items():
        for name, value in values.items():
            expected = sum(clean.mean_state(trajectory.state)[kind][name] for _, trajectory in alone) / 2
            torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-14, check_dtype=False)


def part(inner: Any, task: int) -> Any:
    index = torch.tensor([task])
    indices = tuple(step[index] for step in inner.indices)
    return type(inner)(**{**vars(inner), "episode": inner.episode.select(index), "indices": indices})


def test_finite_tasks_are_run_once() -> None:
    calls = []

    class Counting(Reptile):
        def __call__(self, *args: Any) -> Any:
            calls.append(1)
            return super().__call__(*args)

    learner = sine_learner(Counting(), execution={"tasks_per_chunk": 4})
    trainer(3).fit(learner, datamodule=Poisoned(set()))
    assert len(calls) == 3


@pytest.mark.parametrize("rule", [Reptile(), MAML()], ids=lambda rule: type(rule).__name__)
def test_such_a_task_ends_the_run_by_its_number_before_the_weights_move(rule: Any) -> None:
    learner = sine_learner(rule, SGD(0.01))
    reached = []

    class Look(L.Callback):
        def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
            reached.append(weights(learner))

    message = (
        r"^meta-iteration 3: the support_y of training episode 9, 10 is not finite: mend the data, or leave such tasks "
        r"out with model.outer.on_nonfinite: skip_task\.$"
    )
    with pytest.raises(FloatingPointError, match=message):
        trainer(5, callbacks=[Look()]).fit(learner, datamodule=Poisoned({9, 10}))
    assert len(reached) == 3
    for name, value in weights(learner).items():
        assert torch.equal(value, reached[-1][name])


def test_an_inner_loop_that_diverges_is_found() -> None:
    where = "the loss, gradient or inner state of training episode 0, 1, 2, 3"
    with pytest.raises(FloatingPointError, match=f"^meta-iteration 1: {where} is not finite: lower model.inner"):
        trainer(2).fit(sine_learner(inner=SGD(1e30)), datamodule=Poisoned(set()))


def test_nothing_is_saved_while_such_a_value_is_unseen(tmp_path: Path) -> None:
    """A GPU is looked at every few meta-iterations; a checkpoint looks too."""
    learner = sine_learner()

    class Unseen(L.Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            learner.watch._finite = torch.tensor(trainer.global_step < 4)

    learner.watch.look = lambda *args: None
    callbacks = [Unseen(), SaveLast(2, str(tmp_path))]
    with pytest.raises(FloatingPointError, match="^meta-iteration 4: .* in a meta-iteration shortly before is not"):
        trainer(6, callbacks=callbacks, enable_checkpointing=True).fit(learner, datamodule=Poisoned(set()))
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 2


@pytest.mark.filterwarnings("ignore:.*no task of its meta-batch is finite")
def test_skipped_tasks_are_counted_and_a_meta_batch_of_them_moves_nothing(tmp_path: Path) -> None:
    learner = sine_learner(inner=Adam(0.01), outer={"on_nonfinite": "skip_task", "optimizer": momentum})
    logger = L.pytorch.loggers.CSVLogger(tmp_path, name="", version="run")
    seen: list[Any] = []

    class Look(L.Callback):
        def on_train_batch_start(self, *args: Any) -> None:
            seen.append((weights(learner), learner.carried))

    data = Poisoned({5, 8, 9, 10, 11})  # one of the second meta-batch, all of the third
    settings = {"logger": logger, "log_every_n_steps": 1, "callbacks": [Look()]}
    run = trainer(4, **settings)
    run.fit(learner, datamodule=data)
    with (tmp_path / "run" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["train/skipped_tasks"]) for row in rows] == [0, 1, 5, 5]
    assert rows[2]["train/loss_last_step"] == "nan"  # nothing was learnt from
    assert [bool(float(row["train/loss_last_step"]) > 0) for row in rows] == [True, True, False, True]
    for name, value in seen[3][0].items():
        assert torch.equal(value, seen[2][0][name])
        assert not torch.equal(value, weights(learner)[name])
    assert seen[3][1] is seen[2][1]
    run.save_checkpoint(tmp_path / "c.ckpt")
    rest = sine_learner(inner=Adam(0.01), outer={"on_nonfinite": "skip_task", "optimizer": momentum})
    trainer(4).fit(rest, datamodule=data, ckpt_path=tmp_path / "c.ckpt")
    assert rest.skipped_tasks == 5


def momentum(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.5, momentum=0.9)


def train_poisoned(folder: Path) -> None:
    world = int(os.environ.get("WORLD_SIZE", 1))
    chunk = 1 if world > 1 else None
    learner = sine_learner(MAML(), SGD(0.01), outer={"on_nonfinite": "skip_task"}, execution={"tasks_per_chunk": chunk})
    run = trainer(3, devices=world, strategy="ddp" if world > 1 else "auto", precision="64-true")
    run.fit(learner, datamodule=Poisoned({1, 3, 6, 8, 9, 10, 11}))
    torch.save((weights(learner), learner.skipped_tasks), folder / f"{world}-{os.environ.get('RANK', 0)}.pt")


@pytest.mark.filterwarnings("ignore:.*no task of its meta-batch is finite")
def test_the_mean_over_processes_counts_tasks_not_processes(tmp_path: Path) -> None:
    """Nor chunks."""
    for world in (1, 2):
        group = Group(world, train_poisoned, tmp_path, out=tmp_path)
        assert group.wait(60) == [0] * world, group.said()
    expected, skipped = torch.load(tmp_path / "1-0.pt")
    assert skipped == 7
    for rank in range(2):  # one of them had no task left in the first meta-iteration, both none in the last
        found, count = torch.load(tmp_path / f"2-{rank}.pt")
        assert count == 7
        for name, value in found.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-12, atol=1e-13)


def raise_in_one(folder: Path) -> None:
    trainer(3, devices=2, strategy="ddp").fit(sine_learner(), datamodule=Poisoned({5}))


def test_every_process_ends_where_one_has_such_a_task(tmp_path: Path) -> None:
    group = Group(2, raise_in_one, tmp_path, out=tmp_path)
    assert group.wait(60) == [1, 1], group.said()
    first, second = (log.read_text() for log in group.logs)
    assert "FloatingPointError: meta-iteration 2: the loss, gradient or inner state of another process's task" in first
    assert "FloatingPointError: meta-iteration 2: the support_y of training episode 5" in second


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_is_looked_at_every_ten_meta_iterations() -> None:
    reached = []

    class Look(L.Callback):
        def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
            reached.append(trainer.global_step)

    with pytest.raises(FloatingPointError, match="^meta-iteration 10: .* in a meta-iteration shortly before is not"):
        trainer(30, accelerator="gpu", devices=1, callbacks=[Look()]).fit(sine_learner(), datamodule=Poisoned({9}))
    assert len(reached) == 10
    learner = sine_learner(outer={"on_nonfinite": "skip_task"})
    trainer(30, accelerator="gpu", devices=1).fit(learner, datamodule=Poisoned({9, 10}))
    assert learner.skipped_tasks == 2
    assert all(value.isfinite().all() for value in weights(learner).values())
