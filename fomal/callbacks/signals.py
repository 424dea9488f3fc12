"""What to do when the system or the user asks a process to end."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, NoReturn

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

EXIT_CODE = 128 + signal.SIGTERM
"""The exit code of a run that saved and ended because it was asked to, by SIGTERM or before a requeue: 143."""

Handler = Callable[[int, FrameType | None], Any] | int | None


class Handlers:
    """Signal handlers that are put in place for a while."""

    def __init__(self) -> None:
        self._earlier: dict[int, Handler] = {}

    def install(self, numbers: set[int], handler: Callable[[int, FrameType | None], Any]) -> None:
        """Handle `numbers`; nothing outside the main thread, where Python allows no handlers."""
        if threading.current_thread() is threading.main_thread():
            for number in numbers:
                before = signal.signal(number, handler)
                self._earlier.setdefault(number, before)

    def restore(self) -> None:
        """Put the earlier handlers back."""
        for number, handler in self._earlier.items():
            signal.signal(number, handler)
        self._earlier = {}


def leave(number: int, frame: FrameType | None) -> NoReturn:
    """End the process in order, with the exit code of `number`."""
    raise SystemExit(128 + number)


class ExitOnSigterm(Callback):
    """Ends `validate`, `test` and `predict` with exit code 143 on SIGTERM.

    Lightning's own handler would broadcast to the other processes from wherever it is, and end with code 0.
    """

    def __init__(self) -> None:
        self._handlers = Handlers()

    def _listen(self, trainer: L.Trainer) -> None:
        if trainer.state.fn != "fit":
            self._handlers.install({signal.SIGTERM}, leave)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Listen."""
        self._listen(trainer)

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Listen."""
        self._listen(trainer)

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Listen."""
        self._listen(trainer)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Put the earlier handler back."""
        self._handlers.restore()


def requeue_signal(trainer: L.Trainer) -> int | None:
    """The signal after which a SLURM job goes back into the queue: SIGUSR1, unless Lightning's plugin has another."""
    if "SLURM_JOB_ID" not in os.environ:
        return None
    environment = getattr(trainer.strategy, "cluster_environment", None)
    if not getattr(environment, "auto_requeue", True):
        return None
    return getattr(environment, "requeue_signal", None) or signal.SIGUSR1


def requeue() -> None:
    """Put this SLURM job back into the queue, or say that the batch script must."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ["SLURM_JOB_ID"]
    if shutil.which("scontrol") is None:
        rank_zero_warn(f"scontrol is not here, so the batch script must requeue job {job} (exit code {EXIT_CODE}).")
        return
    done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True)
    if done.returncode:
        rank_zero_warn(f"scontrol requeue {job} failed: {done.stderr.strip()}")
    else:
        rank_zero_info(f"Job {job} is back in the queue.")
