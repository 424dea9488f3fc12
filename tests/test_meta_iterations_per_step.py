"""Several meta-iterations in one step of the Trainer are the same run: checkpoints and log, bitwise."""

from __future__ import annotations

import csv
import os
import re
import signal
from itertools import islice
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from fomal.callbacks import MetaProgressBar, SaveLast
from fomal.cli import main
from fomal.data import SinusoidDataModule
from fomal.inner import Adam
from fomal.models import MLP
from fomal.outer import Reptile
from tests.processes import Group
from tests.sine import tiny_model
from tests.test_learner import Blobs, blob_learner, sine_learner, trainer, weights
from tests.test_parallel import CountCollectives
from tests.test_resume import same

STEPS = 47  # a multiple of no chunk


class Batches(Callback):
    """The meta-iteration at which each batch of Lightning's begins, and its number."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, int]] = []

    def on_train_batch_start(self, trainer: L.Trainer, learner: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append((trainer.global_step, batch_idx))


class Terminate(Callback):
    """Sends this process SIGTERM within a meta-iteration."""

    def __init__(self, step: int, rank: int = 0) -> None:
        self.step, self.rank = step, rank

    def on_before_optimizer_step(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step and trainer.global_rank == self.rank:
            os.kill(os.getpid(), signal.SIGTERM)


def fit(
    folder: Path,
    size: int,
    interval: int,
    *callbacks: Callback,
    workers: int = 0,
    ckpt_path: Path | None = None,
    **changes: Any,
) -> L.Trainer:
    """A run with everything that counts: schedule, log, validation, checkpoints."""
    torch.manual_seed(0)
    learner = sine_learner(
        Reptile(),
        Adam(0.01),
        MLP(hidden=(4,)),
        inner_steps=2,
        outer_optimizer=lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.5),
        meta_iterations_per_step=size,
    )
    every = ModelCheckpoint(folder / "every", save_top_k=-1, every_n_train_steps=4 * interval)
    settings = {
        "logger": CSVLogger(folder, name="", version="log"),
        "log_every_n_steps": interval,
        "val_check_interval": 2 * interval,
        "enable_checkpointing": True,
        "callbacks": [SaveLast(3 * interval, str(folder)), every, *callbacks],
    }
    run = trainer(STEPS, **{**settings, **changes})
    data = SinusoidDataModule(meta_batch_size=4, val_tasks=5, eval_tasks_per_batch=2, num_workers=workers)
    run.fit(learner, datamodule=data, ckpt_path=ckpt_path)
    return run


def checkpoints(folder: Path) -> dict[str, Any]:
    """All checkpoints in whole: weights, optimiser, schedule, carried state, loss sums, and Lightning's own counts."""
    found = {path.name: torch.load(path, weights_only=True) for path in sorted(folder.rglob("*.ckpt"))}
    for content in found.values():
        paths = [name for name in content["callbacks"] if name.startswith("ModelCheckpoint")]
        del content["callbacks"][paths[0]]
    return found


def log(folder: Path) -> list[dict[str, str]]:
    with (folder / "log" / "metrics.csv").open() as file:
        return [{name: value for name, value in row.items() if value} for row in csv.DictReader(file)]


@pytest.mark.parametrize(("size", "workers"), [(3, 0), (10, 0), (3, 2)])
def test_a_run_is_the_one_with_a_meta_iteration_at_a_time(size: int, workers: int, tmp_path: Path) -> None:
    batches = Batches()
    fit(tmp_path / "one", 1, size)
    fit(tmp_path / "several", size, size, batches, workers=workers)
    assert batches.seen == [(step, step) for step in range(0, STEPS, size)]
    one, several = (checkpoints(tmp_path / name) for name in ("one", "several"))
    same(several, one)
    saved = {name: content["global_step"] for name, content in one.items()}
    last = (STEPS - 1) // (3 * size) * 3 * size
    every = {f"epoch=0-step={step}.ckpt": step for step in range(4 * size, STEPS, 4 * size)}
    assert saved == {"last.ckpt": STEPS, "previous.ckpt": last} | every
    assert one["last.ckpt"]["fomal"]["carried"]["shared"]["steps"] == 2 * STEPS
    assert (tmp_path / "several/log/metrics.csv").read_bytes() == (tmp_path / "one/log/metrics.csv").read_bytes()
    rows = log(tmp_path / "several")
    assert [int(row["step"]) for row in rows if "outer_lr" in row] == list(range(size, STEPS, size))
    assert [int(row["step"]) for row in rows if "val/loss" in row] == list(range(2 * size, STEPS, 2 * size))


# Stopped within a chunk, at its end, and where a validation is due; gone on with chunks of the same size or another.
@pytest.mark.parametrize(("stop", "then"), [(16, 6), (16, 1), (16, 3), (17, 6), (11, 2), (23, 6)])
def test_going_on_equals_not_stopping(stop: int, then: int, tmp_path: Path) -> None:
    fit(tmp_path / "whole", 1, 6)
    with pytest.raises(SystemExit) as ended:
        fit(tmp_path / "part", 6, 6, Terminate(stop))
    assert ended.value.code == 143
    last = tmp_path / "part" / "last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == stop + 1  # it finished that meta-iteration alone
    batches = Batches()
    fit(tmp_path / "rest", then, 6, batches, ckpt_path=last)
    whole, rest = (checkpoints(tmp_path / name) for name in ("whole", "rest"))
    same(rest["last.ckpt"], whole["last.ckpt"])
    assert log(tmp_path / "part") + log(tmp_path / "rest") == log(tmp_path / "whole")
    starts = [stop + 1, *range((stop + 1) // then * then + then, STEPS, then)]  # from the next multiple on
    assert batches.seen == [(step, step) for step in starts]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("start", "first"), [(0, [0, 1, 2]), (6, [6, 7, 8]), (7, [7, 8]), (8, [8])])
def test_chunks_begin_at_multiples_of_their_size(
    workers: int, start: int, first: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = SinusoidDataModule(meta_batch_size=2, num_workers=workers)
    data.trainer = trainer()
    data.trainer.strategy._lightning_module = sine_learner(meta_iterations_per_step=3)
    monkeypatch.setattr(type(data.trainer), "global_step", start)
    chunks = [[episode.number.tolist() for episode in chunk] for chunk in islice(data.train_dataloader(), 3)]
    second = first[-1] + 1
    batches = [first, [second, second + 1, second + 2], [second + 3, second + 4, second + 5]]
    assert chunks == [[[2 * m, 2 * m + 1] for m in chunk] for chunk in batches]


def test_inputs_are_prepared_in_each_meta_batch() -> None:
    found = []
    for size in (1, 5):
        learner = blob_learner(meta_iterations_per_step=size)
        trainer(7).fit(learner, datamodule=Blobs())
        found.append(weights(learner))
    same(*found)


def test_a_trial_takes_no_more_than_it_is_told(tmp_path: Path) -> None:
    assert fit(tmp_path, 10, 10, fast_dev_run=3).global_step == 3
    assert not list(tmp_path.rglob("*.ckpt"))


def test_the_progress_bar_counts_meta_iterations(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(tmp_path, 10, 10, MetaProgressBar(line_every=0.0), enable_progress_bar=True)
    steps = [line.split()[1] for line in capsys.readouterr().out.splitlines() if line.startswith("meta-iterations")]
    assert list(dict.fromkeys(steps)) == ["10/47", "20/47", "30/47", "40/47", "47/47"]


# -- several processes


def fit_together(folder: Path, size: int, ckpt_path: Path | None, *callbacks: Callback) -> None:
    count = CountCollectives()
    devices = {"devices": 2, "strategy": "ddp"}
    fit(folder, size, 3, *callbacks, Together(count, folder), count, ckpt_path=ckpt_path, **devices)


class Together(Callback):
    """Writes down what was sent within the first chunk."""

    def __init__(self, count: CountCollectives, folder: Path) -> None:
        self.count, self.folder = count, folder

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == 3 and trainer.is_global_zero:
            self.folder.mkdir(parents=True, exist_ok=True)
            sent = {name: number for name, number in self.count.counts.items() if number}
            (self.folder / "sent.yaml").write_text(yaml.safe_dump(sent))


def test_two_processes_do_the_same_and_stop_together(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("one", "several", "stopped", "rest")]
    for folder in folders:
        folder.mkdir()
    one, several, stopped, rest = folders
    for folder, size in ((one, 1), (several, 3)):
        group = Group(2, fit_together, folder, size, None, out=folder)
        assert group.wait(60) == [0, 0], group.said()
    same(checkpoints(several), checkpoints(one))
    assert log(several) == log(one)
    assert yaml.safe_load((several / "sent.yaml").read_text()) == {"all_reduce": 3}
    group = Group(2, fit_together, stopped, 3, None, Terminate(18, rank=1), out=stopped)
    assert group.wait(60) == [143, 143], group.said()
    last = stopped / "last.ckpt"
    # The signal comes after meta-iteration 19 is sent, and reaches the other process with 20, within a chunk.
    assert torch.load(last, weights_only=True)["global_step"] == 20
    group = Group(2, fit_together, rest, 3, last, out=rest)
    assert group.wait(60) == [0, 0], group.said()
    same(checkpoints(rest)["last.ckpt"], checkpoints(one)["last.ckpt"])


# -- from the command line


def config(folder: Path, size: int) -> str:
    logger = {"class_path": "CSVLogger", "init_args": {"save_dir": str(folder), "name": "", "version": "log"}}
    save = {"class_path": "fomal.callbacks.SaveLast", "init_args": {"every_n_meta_iterations": 10}}
    content = {
        "seed_everything": 3,
        "model": tiny_model("Adam", lr=0.01) | {"meta_iterations_per_step": size},
        "data": {"class_path": "fomal.data.SinusoidDataModule", "init_args": {"meta_batch_size": 2, "val_tasks": 5}},
        "trainer": {
            **{"max_steps": 23, "accelerator": "cpu", "logger": logger, "enable_progress_bar": False},
            **{"log_every_n_steps": 10, "val_check_interval": 10, "callbacks": [save]},
        },
    }
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(content))
    return str(folder / "config.yaml")


def test_from_the_command_line_a_run_may_go_on_with_other_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    main(["fit", "--config", config(tmp_path / "one", 1)])
    with monkeypatch.context() as patch:
        patch.setattr("fomal.cli.run.default_callbacks", lambda trainer: [Terminate(12)])
        with pytest.raises(SystemExit) as ended:
            main(["fit", "--config", config(tmp_path / "several", 5)])
    assert ended.value.code == 143
    last = tmp_path / "several" / "log" / "checkpoints" / "last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == 13
    batches = Batches()
    monkeypatch.setattr("fomal.cli.run.default_callbacks", lambda trainer: [batches])
    main(["fit", "--ckpt_path", str(last), "--model.meta_iterations_per_step=10"])
    assert [step for step, _ in batches.seen] == [13, 20]
    ours, theirs = (torch.load(tmp_path / name / "log/checkpoints/last.ckpt") for name in ("several", "one"))
    for content in (ours, theirs):
        del content["fomal"]["config"]
    same(ours, theirs)
    logs = [(tmp_path / name / "log/metrics.csv").read_bytes() for name in ("several", "one")]
    assert logs[0] == logs[1]


# -- what is refused


@pytest.fixture
def untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Data that may not be used."""

    def use(*args: Any) -> None:
        raise AssertionError("the data have been used")

    monkeypatch.setattr(SinusoidDataModule, "episodes", use)


def test_a_command_line_names_all_intervals_that_do_not_divide(
    tmp_path: Path, fails: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def prepare(self: Any) -> None:
        raise AssertionError("the data have been prepared")

    monkeypatch.setattr(SinusoidDataModule, "prepare_data", prepare)
    assert fails("fit", "--config", config(tmp_path, 3), code=1) == (
        "model.meta_iterations_per_step=3 does not divide trainer.log_every_n_steps=10 (use 9 or 12), "
        "trainer.val_check_interval=10 (use 9 or 12), SaveLast.every_n_meta_iterations=10 (use 9 or 12)."
    )
    assert os.listdir(tmp_path) == ["config.yaml"]


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"log_every_n_steps": 50}, "trainer.log_every_n_steps=50 (use 48 or 54)."),
        ({"val_check_interval": 4}, "trainer.val_check_interval=4 (use 6)."),
        ({"callbacks": [SaveLast(7)]}, "SaveLast.every_n_meta_iterations=7 (use 6 or 12)."),
        (
            {"callbacks": [ModelCheckpoint(every_n_train_steps=9)]},
            "ModelCheckpoint.every_n_train_steps=9 (use 6 or 12).",
        ),
    ],
)
def test_intervals_that_do_not_divide_are_refused(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    message = re.escape(f"model.meta_iterations_per_step=6 does not divide {message}")
    with pytest.raises(ValueError, match=f"^{message}$"):
        fit(tmp_path, 6, 6, **settings)


def test_an_interval_that_is_not_used_is_not_refused(tmp_path: Path) -> None:
    unused = {"val_check_interval": 4, "limit_val_batches": 0, "limit_train_batches": STEPS}
    assert fit(tmp_path, 6, 6, **unused).global_step == STEPS


def test_epochs_within_a_run_are_refused(tmp_path: Path) -> None:
    message = "^trainer.limit_train_batches=12 ends an epoch .*model.meta_iterations_per_step=6 cannot: leave it out"
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, 6, 6, limit_train_batches=12)


def test_other_loaders_are_refused() -> None:
    learner, data = sine_learner(meta_iterations_per_step=5), SinusoidDataModule()
    message = "^model.meta_iterations_per_step=5 needs an EpisodeDataModule, given as datamodule, .*: use 1 with other"
    with pytest.raises(ValueError, match=message):
        trainer(10, log_every_n_steps=5).fit(learner, data.train_dataloader())


def test_less_than_one_is_refused() -> None:
    with pytest.raises(ValueError, match="^meta_iterations_per_step=0 must be at least 1"):
        sine_learner(meta_iterations_per_step=0)
