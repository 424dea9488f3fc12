"""Ctrl-C and SIGTERM end the command line at any moment with their exit code, and without a traceback."""

from __future__ import annotations

import importlib
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

import pytest

from tests.helpers.processes import Group

FIT = [
    "fit",
    "--config=sinusoid/reptile",
    "--trainer.max_steps=2",
    "--trainer.val_check_interval=1",
    "--data.val_tasks=2",
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
]
MOMENTS = {
    "the settings are read": "fomal.cli.run.FomalCLI.parse_arguments",
    "data are prepared": "fomal.tasks.datamodule.EpisodeDataModule.prepare_data",
    "data are loaded": "fomal.tasks.datamodule.EpisodeDataModule.setup",
    "the first batch is drawn": "fomal.data.sinusoid.SinusoidDataModule.episodes",
    "a step is taken": "fomal.learner.meta_learner.MetaLearner.training_step",
    "it is validated": "fomal.learner.meta_learner.MetaLearner.validation_step",
    "a checkpoint is written": "fomal.callbacks.checkpoint.publish",
    "a figure is drawn": "fomal.callbacks.figures.draw_curve",
}


def run(folder: Path, moment: str, args: list[str]) -> None:
    """Run the command of a process of its own, which says so and is slow when it comes to a moment."""
    module, _, name = moment.rpartition(".")
    try:
        owner: Any = importlib.import_module(module)
    except ModuleNotFoundError:
        module, _, kind = module.rpartition(".")
        owner = getattr(importlib.import_module(module), kind)
    inner = getattr(owner, name)

    def slow(*given: Any, **named: Any) -> Any:
        (folder / "there").touch()
        for _ in range(20):
            time.sleep(0.1)
        return inner(*given, **named)

    setattr(owner, name, slow)
    os.chdir(folder)
    sys.argv = ["fomal", *args]
    from fomal.__main__ import main

    main()


def interrupt(folder: Path, moment: str, number: int, args: list[str]) -> tuple[int | None, list[str]]:
    """The exit code, and the lines that it has said since the signal."""
    group = Group(1, run, folder, moment, args, out=folder)
    try:
        end = time.monotonic() + 60
        while not (folder / "there").exists() and time.monotonic() < end and group.processes[0].is_alive():
            time.sleep(0.02)
        time.sleep(0.1)
        before = len(group.said())
        group.send(number)
        (code,) = group.wait(60)
        return code, [line for line in group.said()[before:].splitlines() if line]
    finally:
        group.kill()


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_run_ends_in_order_whenever_it_is_asked_to(moment: str, number: int, code: int, tmp_path: Path) -> None:
    ended, said = interrupt(tmp_path, MOMENTS[moment], number, FIT)
    assert ended == code, said
    saving = [line for line in said if line.startswith(("Ctrl-C: finishing", "SIGTERM: finishing", "Stopped after"))]
    assert said == saving
    if moment in ("a step is taken", "a checkpoint is written"):
        assert (tmp_path / next(tmp_path.rglob("last.ckpt"))).is_file()
    assert not list(tmp_path.rglob("*.unfinished"))


def test_other_verbs_end_as_quietly(tmp_path: Path) -> None:
    folder = tmp_path / "images" / "a"
    folder.mkdir(parents=True)
    args = ["compare", str(tmp_path), "--out", "c.png"]
    assert interrupt(tmp_path, "fomal.cli.compare.find_runs", signal.SIGINT, args) == (130, [])


def test_ctrl_c_in_a_moment_that_raises_nothing_ends_it_too(tmp_path: Path) -> None:
    group = Group(1, destroy, out=tmp_path)
    assert group.wait(60) == [130]
    assert group.said() == ""


def destroy() -> NoReturn:
    """Interrupt the destruction of an object, of which Python else prints a traceback and goes on."""
    import fomal.__main__
    import fomal.cli

    class Destroyed:
        def __del__(self) -> None:
            raise KeyboardInterrupt

    fomal.cli.main = lambda: Destroyed() and None
    sys.argv = ["fomal"]
    fomal.__main__.main()
    raise AssertionError("it went on")
