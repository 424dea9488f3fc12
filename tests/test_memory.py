"""Memory does not grow with the length of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger

from fomal.callbacks import SaveLast
from fomal.data import SinusoidDataModule
from fomal.inner import Adam
from tests.processes import Group
from tests.test_learner import sine_learner, trainer

STEPS = 5000
WARM = 2000  # meta-iterations until caches and arenas have their size


class Resident(Callback):
    """Notes the resident memory of this process, in MiB."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, float]] = []

    def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step % 20 == 0:
            # Without the pages of libraries, which come in as they are first used.
            line = next(s for s in Path("/proc/self/status").read_text().splitlines() if s.startswith("RssAnon"))
            self.seen.append((trainer.global_step, int(line.split()[1]) / 1024))


def train(folder: Path) -> None:
    resident = Resident()
    learner = sine_learner(inner=Adam(0.01), on_nonfinite="skip_task")
    callbacks = [resident, SaveLast(250)]
    logger = CSVLogger(folder, name="", version="run")
    settings = {"callbacks": callbacks, "logger": logger, "log_every_n_steps": 10, "val_check_interval": 250}
    data = SinusoidDataModule(val_tasks=20)
    trainer(STEPS, enable_checkpointing=True, **settings).fit(learner, datamodule=data)
    torch.save(resident.seen, folder / "seen.pt")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_resident_memory_has_no_slope(tmp_path: Path) -> None:
    """With its logging, validation and checkpoints."""
    group = Group(1, train, tmp_path, out=tmp_path)
    assert group.wait(800) == [0], group.said()
    step, memory = np.array([row for row in torch.load(tmp_path / "seen.pt") if row[0] >= WARM]).T
    a, b = np.triu_indices(len(step), len(step) // 2)
    slopes = 1000 * (memory[b] - memory[a]) / (step[b] - step[a])  # Theil and Sen: a single jump does not count
    low, slope, high = np.quantile(slopes, [0.025, 0.5, 0.975])
    print(f"{slope:.3f} ({low:.3f} to {high:.3f}) MiB per 1,000 meta-iterations, at {memory[-1]:.0f} MiB")
    # A copy of this small network's parameters, kept each time, would be 5.
    assert low <= 0 or slope < 0.2, f"memory grows by {slope:.3f} MiB in 1,000 meta-iterations"
