"""Resuming equals not stopping: weights, states, log and results, bitwise, however a run ended."""

from __future__ import annotations

import csv
import json
import os
import random
import signal
import time
from ctypes import c_int
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import Callback

from fomal.cli import main, run
from tests.processes import FORK, Group
from tests.sine import tiny_model

STEPS = 60
Launch = tuple[int, int]  # processes, loader workers


class Pause(Callback):
    """Makes meta-iterations take longer, so that they can be interrupted."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds

    def on_train_batch_start(self, *args: Any) -> None:
        time.sleep(self.seconds)


class Progress(Callback):
    """Tells the test how far the first process is."""

    def __init__(self, shared: Any) -> None:
        self.shared = shared

    def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
        if trainer.is_global_zero:
            self.shared.value = trainer.global_step
        time.sleep(0.002)


def fit(args: list[str], progress: Any) -> None:
    usual = run.default_callbacks
    run.default_callbacks = lambda trainer: [*usual(trainer), Progress(progress)]
    main(["fit", *args])


class Run:
    """A run of `STEPS` meta-iterations in a folder, in one or two processes."""

    def __init__(self, folder: Path, launch: Launch, pause: float = 0.0) -> None:
        folder.mkdir(parents=True)
        self.folder, self.launch, self.starts = folder, launch, 0
        self.progress = FORK.Value(c_int, -1)
        world, workers = launch
        logger = {"class_path": "CSVLogger", "init_args": {"save_dir": str(folder / "runs"), "name": "sine"}}
        config = {
            "seed_everything": 3,
            "model": tiny_model("Adam", lr=0.01) | {"outer_optimizer": {"class_path": "torch.optim.Adam"}},
            "data": {
                "class_path": "fomal.data.SinusoidDataModule",
                "init_args": {"meta_batch_size": 4, "val_tasks": 9, "eval_tasks_per_batch": 2, "num_workers": workers},
            },
            "trainer": {
                "max_steps": STEPS,
                "accelerator": "cpu",
                "devices": world,
                "strategy": "ddp" if world > 1 else "auto",
                "logger": logger,
                "log_every_n_steps": 3,
                "val_check_interval": 7,
                "enable_progress_bar": False,
                "callbacks": [
                    {"class_path": "fomal.callbacks.SaveLast", "init_args": {"every_n_meta_iterations": 5}},
                    {"class_path": "tests.test_resume.Pause", "init_args": {"seconds": pause}},
                ],
            },
        }
        self.config = folder / "config.yaml"
        self.config.write_text(yaml.safe_dump(config))

    @property
    def place(self) -> Path:
        """The run's folder; one that was killed before its first checkpoint has begun anew in the next."""
        folders = (self.folder / "runs" / "sine").glob("version_*/checkpoints")
        return max(folders, key=lambda folder: int(folder.parent.name.split("_")[1])).parent

    @property
    def last(self) -> Path:
        return self.place / "checkpoints" / "last.ckpt"

    def start(self) -> Group:
        """Start it, or start it again: the same command."""
        self.starts += 1
        self.progress.value = -1
        out = self.folder / f"start{self.starts}"
        out.mkdir()
        args = ["--config", str(self.config), "--ckpt_path=last"]
        return Group(self.launch[0], fit, args, self.progress, out=out)

    def wait_for(self, group: Group, step: int) -> None:
        """Wait until it is at meta-iteration `step`."""
        end = time.monotonic() + 60
        while self.progress.value < step:
            assert time.monotonic() < end, group.said()
            assert all(p.is_alive() for p in group.processes), group.said()
            time.sleep(0.0005)

    def finish(self) -> None:
        group = self.start()
        assert group.wait(100) == [0] * self.launch[0], group.said()

    def found(self) -> dict[str, Any]:
        """All that a run leaves."""
        content = torch.load(self.last, weights_only=True)
        kept = {key: content[key] for key in ("global_step", "state_dict", "optimizer_states", "lr_schedulers")}
        with (self.place / "metrics.csv").open() as file:
            log = list(csv.DictReader(file))
        main(
            [
                "test",
                "--ckpt_path",
                str(self.last),
                "--trust=tests",
                "--trainer.enable_progress_bar=false",
                "--data.test_tasks=20",
            ]
        )
        results = json.loads((self.place / "results.json").read_text())
        return kept | {"carried": content["fomal"]["carried"], "log": log, "metrics": results["metrics"]}


def same(a: Any, b: Any, where: str = "") -> None:
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for place, (x, y) in enumerate(zip(a, b, strict=True)):
            same(x, y, f"{where}[{place}]")
    else:
        assert a == b, where


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What a run leaves that nothing stopped, by its launch."""
    known: dict[Launch, dict[str, Any]] = {}

    def made(launch: Launch) -> dict[str, Any]:
        if launch not in known:
            uninterrupted = Run(tmp_path_factory.mktemp("whole") / "run", launch)
            uninterrupted.finish()
            known[launch] = uninterrupted.found()
        return known[launch]

    return made


def killed_and_resumed(run: Run, kills: int, seed: int) -> None:
    """Kill a run with SIGKILL at random moments, start it again each time, and let it end at last."""
    chance = random.Random(seed)
    for _ in range(kills):
        group = run.start()
        try:
            run.wait_for(group, 0)
            step = run.progress.value + chance.randrange(2 * STEPS // (kills + 1))
            run.wait_for(group, min(step, STEPS - 2))
            time.sleep(chance.random() * 0.02)
        finally:
            group.kill()
    run.finish()
    said = (run.folder / f"start{run.starts}" / "process0.log").read_text()
    assert ("going on from" in said) != ("no checkpoint of this run yet: it begins anew" in said)


def test_the_whole_run_is_what_the_test_needs(whole: Any) -> None:
    found = whole((1, 0))
    assert found["global_step"] == STEPS
    assert [int(row["step"]) for row in found["log"] if row["val/loss"]] == list(range(7, STEPS, 7))
    assert [int(row["step"]) for row in found["log"] if row["train/loss_last_step"]] == list(range(3, STEPS + 1, 3))
    assert found["carried"]["shared"]["steps"] == 2 * STEPS


@pytest.mark.parametrize("launch", [(1, 0), (2, 2)])
def test_a_run_that_is_killed_goes_on_as_if_nothing_had_been(launch: Launch, whole: Any, tmp_path: Path) -> None:
    run = Run(tmp_path / "run", launch)
    killed_and_resumed(run, 3, seed=0)
    same(run.found(), whole(launch))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("launch", [(1, 0), (1, 2), (2, 0), (2, 2)])
def test_a_run_that_is_killed_again_and_again_does(launch: Launch, whole: Any, tmp_path: Path) -> None:
    for seed in range(4):
        run = Run(tmp_path / f"run{seed}", launch)
        killed_and_resumed(run, 3, seed)
        same(run.found(), whole(launch))


# -- asked to stop


def ended_by(group: Group, seconds: float) -> list[int | None]:
    """The exit codes of processes that end by themselves within `seconds`."""
    codes = group.wait(seconds)
    assert -signal.SIGKILL not in codes, f"still there after {seconds} s: {group.said()}"
    return codes


@pytest.mark.parametrize(
    ("launch", "to", "number", "code"),
    [
        ((1, 0), None, signal.SIGTERM, 143),
        ((1, 2), None, signal.SIGTERM, 143),
        ((2, 0), 1, signal.SIGTERM, 143),  # one of them alone
        ((2, 0), None, signal.SIGTERM, 143),
        ((2, 0), 0, signal.SIGINT, 130),
    ],
)
def test_a_run_that_is_asked_to_stop_saves_and_goes_on(
    launch: Launch, to: int | None, number: int, code: int, whole: Any, tmp_path: Path
) -> None:
    run = Run(tmp_path / "run", launch)
    group = run.start()
    run.wait_for(group, 23)  # no meta-iteration at which it saves by itself
    group.send(number, to)
    assert ended_by(group, 30) == [code] * launch[0], group.said()
    saved = torch.load(run.last, weights_only=True)["global_step"]
    assert saved >= 23
    assert f"Stopped after meta-iteration {saved}; to go on: fomal fit --ckpt_path {run.last}" in group.said()
    assert "Traceback" not in group.said()
    run.finish()
    same(run.found(), whole(launch))


@pytest.mark.parametrize("launch", [(1, 0), (2, 0)])
def test_a_run_that_is_asked_to_stop_while_it_validates_goes_on_with_that(
    launch: Launch, whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class StopInValidation(Callback):
        def on_validation_batch_end(self, trainer: Any, learner: Any, out: Any, batch: Any, batch_idx: int) -> None:
            if trainer.global_step == 21 and batch_idx == 1:
                os.kill(os.getpid(), signal.SIGTERM)

    usual = run.default_callbacks
    stopped = Run(tmp_path / "run", launch)
    monkeypatch.setattr(run, "default_callbacks", lambda trainer: [*usual(trainer), StopInValidation()])
    group = stopped.start()
    assert ended_by(group, 60) == [143] * launch[0], group.said()
    monkeypatch.setattr(run, "default_callbacks", usual)
    # Several processes finish the validation, and the meta-iteration after it.
    assert torch.load(stopped.last, weights_only=True)["global_step"] == (21 if launch[0] == 1 else 22)
    stopped.finish()
    same(stopped.found(), whole(launch))


def test_a_process_that_dies_ends_the_others_with_a_message(whole: Any, tmp_path: Path) -> None:
    run = Run(tmp_path / "run", (2, 0))
    group = run.start()
    run.wait_for(group, 23)
    group.send(signal.SIGKILL, 1)
    assert group.wait(20) == [1, -signal.SIGKILL]
    errors = [line for line in group.said().splitlines() if line.startswith("fomal: error: ")]
    assert len(errors) == 1
    assert (
        "process 0: another of the 2 processes ended, or cannot be reached: see what it said; `--ckpt_path last`"
        in errors[0]
    )
    run.finish()
    same(run.found(), whole((2, 0)))


def test_a_finished_run_that_is_started_again_ends_at_once(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", (1, 0))
    run.finish()
    before = {path.name: path.read_bytes() for path in (run.last, run.place / "metrics.csv")}
    run.finish()
    assert {path.name: path.read_bytes() for path in (run.last, run.place / "metrics.csv")} == before
