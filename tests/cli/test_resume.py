"""Resuming equals not stopping: weights, states, log and results, bitwise, however a run ended."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from fomal.cli import run
from tests.helpers.processes import Group
from tests.helpers.resume import STEPS, Launch, Run, same


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
