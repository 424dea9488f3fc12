"""Runs of the command line that are stopped and go on."""

from __future__ import annotations

import csv
import json
import time
from ctypes import c_int
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import Callback

from fomal.cli import main, run
from tests.helpers.processes import FORK, Group
from tests.helpers.sine import tiny_model

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
            "model": tiny_model("Adam", lr=0.01) | {"outer": {"optimizer": {"class_path": "torch.optim.Adam"}}},
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
                    {"class_path": "tests.helpers.resume.Pause", "init_args": {"seconds": pause}},
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

    def start(self, *more: str, nodes: int = 1) -> Group:
        """Start it, or start it again: the same command, and more options."""
        self.starts += 1
        self.progress.value = -1
        out = self.folder / f"start{self.starts}"
        out.mkdir()
        args = ["--config", str(self.config), "--ckpt_path=last", *more]
        return Group(self.launch[0], fit, args, self.progress, out=out, nodes=nodes)

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
