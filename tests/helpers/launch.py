"""Runs begun by torchrun."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.resume import Run

TORCHRUN = (sys.executable, "-m", "torch.distributed.run")


def workers(parent: int) -> list[int]:
    """The processes that `parent` has started, as Linux knows them."""
    text = Path(f"/proc/{parent}/task/{parent}/children").read_text()
    return [int(pid) for pid in text.split()]


class Launched:
    """A launcher and what it starts, with its output in a file."""

    def __init__(self, command: Sequence[str], out: Path, **variables: str) -> None:
        self.out = out
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "WANDB"))}
        # Without it torch elastic does not always recover from a worker that was killed.
        environment |= {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", **variables}
        with out.open("w") as file:
            self.process = subprocess.Popen(command, stdout=file, stderr=file, env=environment, start_new_session=True)

    def until(self, condition: Any, seconds: float = 90) -> Any:
        """Wait until `condition()` is true, and return it."""
        end = time.monotonic() + seconds
        while not (found := condition()):
            assert time.monotonic() < end, self.out.read_text()
            assert self.process.poll() is None, self.out.read_text()
            time.sleep(0.05)
        return found

    def wait(self, seconds: float = 120) -> int:
        try:
            return self.process.wait(seconds)
        finally:
            self.kill()

    def kill(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


@pytest.fixture
def launch() -> Iterator[Any]:
    """Starts a launcher; kills what is left of it at the end."""
    started: list[Launched] = []

    def start(command: Sequence[str], out: Path, **variables: str) -> Launched:
        started.append(Launched(command, out, **variables))
        return started[-1]

    yield start
    for launched in started:
        launched.kill()


def fit(run: Run, *more: str) -> list[str]:
    return ["-m", "fomal", "fit", "--config", str(run.config), "--ckpt_path=last", *more]
