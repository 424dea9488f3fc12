"""End an evaluation in order, and put a SLURM job back into the queue."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess

import lightning as L
from lightning.pytorch.callbacks import Callback

from fomal.run.stop_signals import EXIT_CODE, Handlers, leave
from fomal.utils.output import rank_zero_info, rank_zero_warn


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
