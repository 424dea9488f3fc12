"""Task numbers follow the meta-iteration, however the trainer cuts a run into epochs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback

from fomal.data import SinusoidDataModule
from fomal.learner.meta_learner import MetaLearner
from tests.helpers.learners import sine_learner, trainer, weights
from tests.helpers.processes import Group
from tests.helpers.resume import same


class Seen(Callback):
    """The meta-batches of a run by their numbers, and a checkpoint in its midst, after which it may end."""

    def __init__(self, save: Path | None = None, at: int = -1, ends: bool = False) -> None:
        self.save, self.at, self.ends = save, at, ends
        self.batches: list[int] = []

    def on_train_batch_start(self, trainer: L.Trainer, learner: Any, batch: Any, batch_idx: int) -> None:
        self.batches.append(batch.number[0].item() // 2)

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == self.at:
            trainer.save_checkpoint(self.save)
            trainer.should_stop = self.ends


def fit(seen: Seen, workers: int = 0, ckpt_path: Path | None = None, **settings: Any) -> MetaLearner:
    learner = sine_learner(outer={"final": 1.0}, train={"steps": 2})
    data = SinusoidDataModule(meta_batch_size=2, val_tasks=3, num_workers=workers)
    plain = {"check_val_every_n_epoch": 1, "val_check_interval": 1.0, "callbacks": [seen]}
    trainer(**{"steps": 11, **plain, **settings}).fit(learner, datamodule=data, ckpt_path=ckpt_path)
    return learner


@pytest.mark.filterwarnings("error:You're resuming from a checkpoint")
@pytest.mark.parametrize(
    ("settings", "stops"),
    [
        ({"limit_train_batches": 4}, [3, 8]),
        ({"limit_train_batches": 4, "workers": 2}, [6]),
        ({"limit_train_batches": 4, "reload_dataloaders_every_n_epochs": 1}, [8]),
        ({"limit_train_batches": 4, "check_val_every_n_epoch": 2, "num_sanity_val_steps": 2}, [4]),
        ({"limit_train_batches": 4, "val_check_interval": 0.5}, [6]),
        ({"limit_train_batches": 4, "max_epochs": 3, "steps": -1}, [6]),
    ],
)
def test_tasks_go_on_over_epochs_and_a_resumed_run_sees_the_same(
    settings: dict[str, Any], stops: list[int], tmp_path: Path
) -> None:
    steps = 12 if "max_epochs" in settings else 11
    expected = weights(fit(seen := Seen(), **settings))
    assert seen.batches == list(range(steps))
    for stop in stops:
        fit(part := Seen(tmp_path / f"{stop}.ckpt", stop, ends=True), **settings)
        assert part.batches == list(range(stop))
        resumed = fit(rest := Seen(), ckpt_path=tmp_path / f"{stop}.ckpt", **settings)
        assert rest.batches == list(range(stop, steps))
        same(weights(resumed), expected)


def test_epochs_change_nothing_but_their_number() -> None:
    same(weights(fit(Seen(), limit_train_batches=4)), weights(fit(Seen())))


def in_processes(world: int, folder: Path) -> None:
    """Three epochs of four meta-iterations, whole, and once more, stopped in the midst of the second and gone on."""
    several = {"devices": world, "strategy": "ddp"} if world > 1 else {}
    settings = {"limit_train_batches": 4, "max_epochs": 3, "steps": -1, "precision": "64-true", **several}
    whole = weights(fit(seen := Seen(), **settings))
    fit(part := Seen(folder / f"{world}.ckpt", 6, ends=True), **settings)
    resumed = weights(fit(rest := Seen(), ckpt_path=folder / f"{world}.ckpt", **settings))
    found = {"whole": whole, "resumed": resumed, "seen": seen.batches, "parts": [part.batches, rest.batches]}
    torch.save(found, folder / f"{world}-{os.environ.get('RANK', 0)}.pt")


def test_two_processes_are_one(tmp_path: Path) -> None:
    group = Group(2, in_processes, 2, tmp_path, out=tmp_path)
    in_processes(1, tmp_path)
    assert group.wait(100) == [0, 0], group.said()
    one, *two = (torch.load(tmp_path / f"{name}.pt") for name in ("1-0", "2-0", "2-1"))
    for found in (one, *two):
        assert found["seen"] == list(range(12))  # the meta-batches that each has a part of
        assert found["parts"] == [list(range(6)), list(range(6, 12))]
        same(found["resumed"], found["whole"])
        for name, value in found["whole"].items():
            torch.testing.assert_close(value, one["whole"][name], rtol=1e-12, atol=1e-13)


def test_only_overfit_batches_repeats(tmp_path: Path) -> None:
    fit(seen := Seen(tmp_path / "c.ckpt", 6), overfit_batches=4)
    assert seen.batches == [0, 1, 2, 3] * 2 + [0, 1, 2]
    fit(rest := Seen(), overfit_batches=4, ckpt_path=tmp_path / "c.ckpt")
    assert rest.batches == [2, 3, 0, 1, 2]


def test_a_second_fit_of_a_trainer_goes_on_and_another_trainer_begins_at_the_first_task() -> None:
    learner, data = sine_learner(outer={"final": 1.0}), SinusoidDataModule(meta_batch_size=2)
    run = trainer(3, callbacks=[seen := Seen()])
    run.fit(learner, datamodule=data)
    run.fit_loop.epoch_loop.max_steps = 5
    run.fit(learner, datamodule=data)
    assert seen.batches == [0, 1, 2, 3, 4]
    trainer(2, callbacks=[again := Seen()]).fit(learner, datamodule=data)
    assert again.batches == [0, 1]
    assert torch.isfinite(torch.cat([w.flatten() for w in weights(learner).values()])).all()
