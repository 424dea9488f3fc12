"""Several meta-iterations in one step of the Trainer, which counts batches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint

from fomal.watch import Watch


def one_by_one(trainer: L.Trainer, batch: Any, watch: Watch) -> Iterator[Any]:
    """The meta-batch of a step or, of a chunk (a list), those in it, as far as `max_steps` or a request to stop."""
    for place, part in enumerate(batch if isinstance(batch, list) else [batch]):
        if place:
            if trainer.global_step == trainer.max_steps or watch.ends(trainer.world_size):
                break
            count_batch(trainer)
        yield part


def count_batch(trainer: L.Trainer) -> None:
    """Within a step: count a batch as finished and another as begun, as Lightning's loop does between two steps."""
    loop = trainer.fit_loop.epoch_loop
    parts: list[Any] = [loop.batch_progress.total, loop.batch_progress.current]
    for part in parts:
        part.ready += 1
        part.started += 1
        part.processed += 1
        part.completed += 1
    loop._batches_that_stepped += 1


def total_steps(trainer: L.Trainer) -> int:
    """The meta-iterations of a run, by `max_steps` or else by epochs of limited length; -1 where neither ends it."""
    epochs, limit = trainer.max_epochs, trainer.limit_train_batches
    if trainer.max_steps >= 0 or not isinstance(limit, int) or not epochs or epochs < 0:
        return trainer.max_steps
    return epochs * limit


def check_intervals(trainer: L.Trainer, size: int) -> None:
    """Refuse what would fall within a chunk of `size` meta-iterations: validations, rows of the log, checkpoints.

    Raises:
        ValueError: naming each such setting, its value and the nearest that do.
    """
    if size == 1:
        return
    limit, end = trainer.limit_train_batches, trainer.max_steps
    if isinstance(limit, int) and limit and not 0 <= end <= limit:
        raise ValueError(
            f"trainer.limit_train_batches={limit} ends an epoch within the run, which "
            f"model.meta_iterations_per_step={size} cannot: leave it out, and give trainer.max_steps."
        )
    wrong = [
        f"{name}={value} (use {' or '.join(str(n) for n in _multiples_near(value, size))})"
        for name, value in _intervals(trainer).items()
        if value % size
    ]
    if wrong:
        raise ValueError(f"model.meta_iterations_per_step={size} does not divide {', '.join(wrong)}.")


def _intervals(trainer: L.Trainer) -> dict[str, int]:
    """Settings that count meta-iterations."""
    found = {"trainer.log_every_n_steps": trainer.log_every_n_steps}  # type: ignore[attr-defined] # set by a helper
    validate = getattr(trainer, "val_check_interval", None)  # a share of an epoch where it is no integer
    if isinstance(validate, int) and trainer.limit_val_batches:
        found["trainer.val_check_interval"] = validate
    for callback in trainer.callbacks:  # type: ignore[attr-defined] # set by a helper
        name = type(callback).__name__
        if isinstance(callback, ModelCheckpoint):
            found[f"{name}.every_n_train_steps"] = callback._every_n_train_steps
        elif hasattr(callback, "every_n_meta_iterations"):
            found[f"{name}.every_n_meta_iterations"] = callback.every_n_meta_iterations
    return found


def _multiples_near(value: int, size: int) -> list[int]:
    below = value // size * size
    return [multiple for multiple in (below, below + size) if multiple]
