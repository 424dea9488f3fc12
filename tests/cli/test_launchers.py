"""The launchers of others: torchrun, which starts again what has died, and Lightning's own."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.launch import TORCHRUN, fit, workers
from tests.helpers.processes import free_port
from tests.helpers.resume import Run, same


def torchrun(run: Run, restarts: int) -> list[str]:
    port = f"--rdzv-endpoint=127.0.0.1:{free_port()}"
    return [*TORCHRUN, "--nproc-per-node=2", "--rdzv-backend=c10d", port, f"--max-restarts={restarts}", *fit(run)]


@pytest.mark.timeout(400)
def test_torchrun_starts_again_what_was_killed_and_it_goes_on(launch: Any, whole: Any, tmp_path: Path) -> None:
    run = Run(tmp_path / "run", (2, 0), pause=0.05)
    launched = launch(torchrun(run, 2), tmp_path / "out")
    launched.until(lambda: list(run.folder.glob("runs/sine/*/checkpoints/last.ckpt")))
    os.kill(workers(launched.process.pid)[-1], signal.SIGKILL)
    assert launched.wait(200) == 0, launched.out.read_text()
    said = launched.out.read_text()
    assert "going on from" in said
    same(run.found(), whole((2, 0)))


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_sigterm_to_torchrun_saves(launch: Any, whole: Any, tmp_path: Path) -> None:
    run = Run(tmp_path / "run", (2, 0), pause=0.05)
    launched = launch(torchrun(run, 0), tmp_path / "out")
    launched.until(lambda: list(run.folder.glob("runs/sine/*/checkpoints/last.ckpt")))
    launched.process.terminate()
    assert launched.wait(60) not in (0, -signal.SIGKILL)
    assert "Stopped after meta-iteration" in launched.out.read_text()
    run.finish()
    same(run.found(), whole((2, 0)))


@pytest.mark.timeout(400)
def test_lightnings_own_launcher_trains_the_same(launch: Any, whole: Any, tmp_path: Path) -> None:
    run = Run(tmp_path / "run", (2, 0))
    launched = launch([sys.executable, *fit(run)], tmp_path / "out")
    assert launched.wait(200) == 0, launched.out.read_text()
    same(run.found(), whole((2, 0)))


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_torchrun_with_a_trainer_that_does_not_see_it_is_refused(launch: Any, tmp_path: Path) -> None:
    run = Run(tmp_path / "run", (1, 0))
    launched = launch([*TORCHRUN, "--nproc-per-node=2", f"--master-port={free_port()}", *fit(run)], tmp_path / "out")
    assert launched.wait() == 1
    said = launched.out.read_text()
    assert said.count("fomal: error: WORLD_SIZE=2: this is one of 2 processes, but the trainer knows of 1") >= 1
    assert not list(run.folder.glob("runs/sine/*/checkpoints"))
