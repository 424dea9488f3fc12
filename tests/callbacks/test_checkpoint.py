"""The last checkpoint: when it is written, and what Ctrl-C leaves."""

from __future__ import annotations

import csv
import multiprocessing
import os
import shlex
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import Callback

from fomal.callbacks import SaveLast
from fomal.callbacks.folder import run_folder
from fomal.cli import main
from fomal.data import SinusoidDataModule
from fomal.inner import Adam
from fomal.learner.meta_learner import MetaLearner
from fomal.learner.settings import InnerSchedule
from fomal.models import MLP
from fomal.outer import Reptile
from tests.helpers.sine import tiny_model


def fit(callbacks: list[Callback], steps: int, folder: Path, **settings: Any) -> L.Trainer:
    """A tiny sine run made in Python."""
    torch.manual_seed(0)
    learner = MetaLearner(MLP(hidden=[4]), Reptile(), Adam(0.01), train=InnerSchedule(2), eval=InnerSchedule(2, 5))
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = L.Trainer(
        max_steps=steps, accelerator="cpu", callbacks=callbacks, default_root_dir=folder, **quiet, **settings
    )
    trainer.fit(learner, datamodule=SinusoidDataModule(meta_batch_size=2))
    return trainer


def saved_step(path: Path) -> int | None:
    return torch.load(path, weights_only=True)["global_step"] if path.exists() else None


class At(Callback):
    """Does something at a hook, at one meta-iteration (the number of those finished)."""

    def __init__(self, hook: str, step: int, action: Callable[[], Any]) -> None:
        self.step, self.action = step, action
        setattr(self, hook, self.act)

    def act(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step and not trainer.sanity_checking:
            self.action()


def ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def ctrl_c_twice() -> None:
    ctrl_c()
    time.sleep(0)  # the handler runs between two instructions
    ctrl_c()


@pytest.fixture(autouse=True)
def handler() -> Iterator[Any]:
    """A SIGINT handler of the test's own: the runs must put it back."""

    def ours(*args: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, ours)
    yield ours
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is told to the user."""
    lines: list[str] = []
    monkeypatch.setattr("fomal.callbacks.checkpoint.rank_zero_info", lines.append)
    return lines


# -- when it is written


def test_it_is_written_every_n_meta_iterations_and_at_the_end(tmp_path: Path, handler: Any) -> None:
    last, seen, handlers = tmp_path / "checkpoints" / "last.ckpt", [], []

    class Look(Callback):
        def on_before_optimizer_step(self, *args: Any) -> None:
            seen.append(saved_step(last))

        def on_fit_end(self, *args: Any) -> None:
            handlers.append(signal.getsignal(signal.SIGINT))

    fit([SaveLast(3), Look()], 7, tmp_path)
    assert seen == [None, None, None, 3, 3, 3, 6]
    assert sorted(os.listdir(last.parent)) == ["last.ckpt", "previous.ckpt"]
    assert saved_step(last.with_name("previous.ckpt")) == 6
    content = torch.load(last, weights_only=True)
    assert content["global_step"] == content["fomal"]["max_steps"] == 7
    assert content["fomal"]["carried"]["shared"]["steps"] == 2 * 7
    assert content["optimizer_states"]
    assert content["lr_schedulers"]
    assert handlers == [handler]  # while figures are drawn Ctrl-C is the caller's again
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_write_that_fails_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, handler: Any) -> None:
    def disk_full(checkpoint: dict[str, Any], path: Path) -> None:
        Path(path).write_bytes(b"half a checkpoint")
        raise OSError("No space left on device")

    fill = At("on_train_batch_start", 3, lambda: monkeypatch.setattr(write, disk_full))
    write = "lightning.fabric.plugins.io.torch_io._atomic_save"
    with pytest.raises(OSError, match="No space left"):
        fit([SaveLast(2, str(tmp_path)), fill], 6, tmp_path)
    assert os.listdir(tmp_path) == ["last.ckpt"]
    assert saved_step(tmp_path / "last.ckpt") == 2
    assert signal.getsignal(signal.SIGINT) is handler


def test_that_of_an_earlier_run_is_kept(tmp_path: Path) -> None:
    for steps in (2, 3, 4):
        fit([SaveLast(dirpath=str(tmp_path))], steps, tmp_path)
    kept = {path.name: saved_step(path) for path in tmp_path.iterdir()}
    assert kept == {"last.ckpt": 4, "last_1.ckpt": 2, "last_2.ckpt": 3}


def test_a_trial_leaves_none(tmp_path: Path, said: list[str]) -> None:
    fit([SaveLast(1, str(tmp_path))], 2, tmp_path, fast_dev_run=2)
    with pytest.raises(SystemExit):
        fit([SaveLast(1, str(tmp_path)), At("on_train_batch_start", 1, ctrl_c)], 2, tmp_path, fast_dev_run=2)
    assert not list(tmp_path.iterdir())
    assert not said


def test_no_interval_below_one() -> None:
    with pytest.raises(ValueError, match="every_n_meta_iterations=0 must be at least 1"):
        SaveLast(0)


def test_the_folder_of_a_logger_that_shares_one_is_its_own(tmp_path: Path) -> None:
    class Elsewhere(L.pytorch.loggers.logger.DummyLogger):
        save_dir, name, version = str(tmp_path), "project", "id7"

    trainer = L.Trainer(logger=Elsewhere(), accelerator="cpu", enable_checkpointing=False)
    assert run_folder(trainer) == tmp_path / "project" / "id7"


# -- Ctrl-C


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Run through the command line with SaveLast and the given callbacks; returns what `main` does."""
    folder = tmp_path / "a folder"  # the command to go on must survive the blank
    logger = {"class_path": "CSVLogger", "init_args": {"save_dir": str(folder), "name": "", "version": "run"}}
    config = {
        "seed_everything": 3,
        "model": tiny_model("Adam", lr=0.01),
        "data": {
            "class_path": "fomal.data.SinusoidDataModule",
            "init_args": {"meta_batch_size": 2, "val_tasks": 6, "eval_tasks_per_batch": 2},
        },
        "trainer": {
            "max_steps": 8,
            "accelerator": "cpu",
            "logger": logger,
            "log_every_n_steps": 3,
            "val_check_interval": 4,
            "enable_progress_bar": False,
        },
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))

    def call(*callbacks: Callback, args: list[str] | None = None, every: int = 1000) -> Any:
        monkeypatch.setattr("fomal.cli.run.default_callbacks", lambda trainer: [SaveLast(every), *callbacks])
        return main(args or ["fit", "--config", str(tmp_path / "run.yaml")])

    return call


def interrupted(call: Callable[..., Any], *callbacks: Callback, **how: Any) -> None:
    with pytest.raises(SystemExit) as stop:
        call(*callbacks, **how)
    assert stop.value.code == 130


def rows(path: Path) -> dict[int, dict[str, str]]:
    """The figures logged at each meta-iteration."""
    merged: dict[int, dict[str, str]] = {}
    for row in csv.DictReader(path.open()):
        merged.setdefault(int(row["step"]), {}).update({k: v for k, v in row.items() if v and k != "epoch"})
    return merged


# What Lightning had still to log or to validate when it was stopped is lost; what comes later must be the same.
@pytest.mark.parametrize(
    ("hook", "step", "done"),
    [("on_before_optimizer_step", 1, 2), ("on_before_optimizer_step", 4, 5), ("on_validation_batch_start", 4, 4)],
)
def test_going_on_after_ctrl_c_equals_not_stopping(
    hook: str, step: int, done: int, run: Callable[..., Any], said: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "a folder" / "run"
    whole = run()
    expected = rows(folder / "metrics.csv")
    interrupted(run, At(hook, step, ctrl_c))
    last = folder / "checkpoints" / "last.ckpt"
    assert os.listdir(last.parent).count("last.ckpt") == 1
    assert not list(last.parent.glob("*.unfinished"))
    assert saved_step(last) == done
    *_, message = said
    text, command = message.split("; to go on: ")
    assert text == f"Stopped after meta-iteration {done}"
    assert shlex.split(command) == ["fomal", "fit", "--ckpt_path", str(last)]
    resumed = run(args=shlex.split(command)[1:])
    assert resumed.trainer.global_step == 8
    assert_equal(resumed.model.network.state_dict(), whole.model.network.state_dict())
    assert whole.model.carried.keys() == resumed.model.carried.keys() == {"shared", "second_moment"}
    for part, values in whole.model.carried.items():
        assert_equal(resumed.model.carried[part], values)
    logged = rows(folder / "metrics.csv")
    assert logged == {at: figures for at, figures in expected.items() if at in logged}
    assert {at for at in expected if at > done} <= logged.keys()


def assert_equal(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_ctrl_c_finishes_the_meta_iteration_and_says_so(run: Callable[..., Any], said: list[str]) -> None:
    finished = []
    watch = At("on_train_batch_end", 3, lambda: finished.append(3))
    interrupted(run, At("on_before_optimizer_step", 2, ctrl_c), watch)
    assert finished == [3]
    assert said[0] == "Ctrl-C: finishing this meta-iteration and saving; press again to stop at once."
    assert said[1].startswith("Stopped after meta-iteration 3; to go on: ")


def test_ctrl_c_twice_stops_at_once(run: Callable[..., Any], said: list[str], tmp_path: Path) -> None:
    finished = []
    watch = At("on_train_batch_end", 5, lambda: finished.append(5))
    interrupted(run, At("on_before_optimizer_step", 4, ctrl_c_twice), watch, every=2)
    assert not finished
    assert len(said) == 1  # nothing about going on: the last checkpoint is an older one
    assert saved_step(tmp_path / "a folder" / "run" / "checkpoints" / "last.ckpt") == 4


def test_ctrl_c_before_training_leaves_an_earlier_checkpoint_alone(tmp_path: Path, said: list[str]) -> None:
    fit([SaveLast(dirpath=str(tmp_path))], 2, tmp_path)
    before = (tmp_path / "last.ckpt").read_bytes()
    with pytest.raises(SystemExit):
        fit([SaveLast(dirpath=str(tmp_path)), At("on_fit_start", 0, ctrl_c)], 4, tmp_path)
    assert (tmp_path / "last.ckpt").read_bytes() == before
    assert os.listdir(tmp_path) == ["last.ckpt"]
    assert not said


@pytest.mark.parametrize("hook", ["on_before_optimizer_step", "on_train_batch_start"])
def test_ctrl_c_puts_the_handler_back(hook: str, tmp_path: Path, handler: Any) -> None:
    with pytest.raises(SystemExit):
        fit([SaveLast(), At(hook, 2, ctrl_c)], 4, tmp_path)
    assert signal.getsignal(signal.SIGINT) is handler


def as_from_a_terminal(args: list[str], out: Path) -> None:
    os.setsid()  # Ctrl-C on a terminal goes to all processes of a group
    for stream in (1, 2):
        os.dup2(os.open(out, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    main(args)


@pytest.mark.timeout(120)
def test_ctrl_c_on_a_terminal_reaches_the_loader_processes_too(tmp_path: Path) -> None:
    args = [
        *("fit", "--config", "sinusoid/reptile", "--data.num_workers=2", "--trainer.accelerator=cpu"),
        *("--trainer.max_steps=1000000", "--trainer.val_check_interval=1000000"),
        *("--trainer.callbacks=fomal.callbacks.SaveLast", "--trainer.callbacks.every_n_meta_iterations=5"),
        *("--trainer.logger=false", f"--trainer.default_root_dir={tmp_path}", "--trainer.enable_progress_bar=false"),
    ]
    last, out = tmp_path / "checkpoints" / "last.ckpt", tmp_path / "out"
    run = multiprocessing.get_context("fork").Process(target=as_from_a_terminal, args=(args, out))
    run.start()
    try:
        while not last.exists():
            assert run.is_alive(), out.read_text()
            time.sleep(0.01)
        os.killpg(run.pid, signal.SIGINT)
        run.join()
    finally:
        run.kill()
    assert run.exitcode == 130, out.read_text()
    assert "Traceback" not in out.read_text()
    assert (saved_step(last) or 0) >= 5
