"""Refuse, before any work, what cannot run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.strategies import DDPStrategy, ParallelStrategy

from fomal.evaluation.figures import Quantity
from fomal.utils.output import rank_zero_info, rank_zero_warn
from fomal.utils.processes import launched_processes, leave_at_exit

HALF = "would need loss scaling inside the inner loop, which is not there: use 32-true, or bf16-mixed."


def check_trainer(trainer: L.Trainer) -> None:
    """Check precision, strategy and launch.

    Raises:
        ValueError: for what the learner cannot run under, naming setting, value and remedy.
    """
    check_precision(trainer.precision)
    _check_launch(trainer)
    _check_strategy(trainer)
    leave_at_exit()


INSTEAD = {
    "GradientAccumulationScheduler": "choose data.meta_batch_size, the tasks of a meta-iteration,",
    "StochasticWeightAveraging": "let the outer step size decay (model.outer.final: 0)",
    "LearningRateFinder": "try some model.outer.optimizer.lr, side by side with --replicas,",
    "BatchSizeFinder": "leave model.execution.tasks_per_chunk: null, which takes as many tasks at once as fit,",
    "BackboneFinetuning": "choose what the inner loop adapts with model.adapt",
}
"""What does the work of Lightning's callbacks that need the loss or the epochs of supervised training."""


def check_outer_step(trainer: Any) -> None:
    """Refuse what Lightning does to the gradient of a loss, which a meta-iteration does not have.

    Raises:
        ValueError: naming the trainer's setting or callback, and what does the same here.
    """
    clip, times = trainer.gradient_clip_val, trainer.accumulate_grad_batches
    if clip:
        algorithm = trainer.gradient_clip_algorithm
        how = f" and model.outer.clip_algorithm={algorithm.value}" if algorithm else ""
        raise ValueError(
            f"trainer.gradient_clip_val={clip} clips the gradient of a loss, which a meta-iteration does not have: use "
            f"model.outer.clip_val={clip}{how} instead, which clips the outer gradient."
        )
    if times != 1:
        raise ValueError(
            f"trainer.accumulate_grad_batches={times}: a meta-iteration takes the mean over as many tasks as you like, "
            f"in chunks that fit memory: multiply data.meta_batch_size by {times} instead."
        )
    for callback in trainer.callbacks:
        for kind in {base.__name__ for base in type(callback).__mro__} & INSTEAD.keys():
            raise ValueError(f"the callback {kind} does not work with meta-iterations: {INSTEAD[kind]} instead.")


def check_epochs(trainer: Any) -> None:
    """Refuse what counts in shares of an epoch, or by epochs, which have no end unless their length is limited.

    Raises:
        ValueError: naming the trainer's setting and the remedy.
    """
    limit, validate = trainer.limit_train_batches, getattr(trainer, "val_check_interval", None)  # none: by time
    for name, value in {"overfit_batches": trainer.overfit_batches, "limit_train_batches": limit}.items():
        if isinstance(value, float) and value not in (0.0, 1.0):
            raise ValueError(
                f"trainer.{name}={value} is a share of the training stream, which is endless: give the number of "
                f"meta-iterations instead, e.g. trainer.{name}=100."
            )
    if isinstance(limit, int):
        return
    if isinstance(validate, float) and validate != 1.0:
        raise ValueError(
            f"trainer.val_check_interval={validate} is a share of an epoch, which is endless: give the number of "
            f"meta-iterations between validations, or trainer.limit_train_batches, those of an epoch."
        )
    timers = [callback for callback in trainer.callbacks if isinstance(callback, Timer)]
    by_epoch = [timer for timer in timers if timer._interval == "epoch"]
    if by_epoch and trainer.max_steps < 0:
        raise ValueError(
            "the callback Timer with interval=epoch looks at the end of an epoch, which is endless: use interval=step."
        )
    if trainer.max_steps < 0 and (trainer.max_epochs or 0) > 0 and not timers:
        raise ValueError(
            f"trainer.max_steps=-1 leaves the run without an end, since an epoch is endless (trainer.max_epochs="
            f"{trainer.max_epochs}): set trainer.max_steps, or trainer.limit_train_batches, the meta-iterations of an "
            f"epoch."
        )


def check_monitors(trainer: Any, figures: Mapping[str, Quantity]) -> None:
    """Refuse callbacks that keep or stop by a validation figure in the wrong direction, such as `ModelCheckpoint`.

    Args:
        trainer: with the callbacks.
        figures: of a validation, by their names.

    Raises:
        ValueError: naming callback, figure and the mode to give.
    """
    for callback in trainer.callbacks:
        monitor, mode = getattr(callback, "monitor", None), getattr(callback, "mode", None)
        figure = figures.get(str(monitor).removeprefix("val/")) if str(monitor).startswith("val/") else None
        if figure is None or figure.higher_is_better is None or mode not in ("min", "max"):
            continue
        wanted = "max" if figure.higher_is_better else "min"
        if mode != wanted:
            better = "higher" if figure.higher_is_better else "lower"
            raise ValueError(
                f"{type(callback).__name__} has monitor={monitor!r} with mode={mode!r}, but {better} is better: give "
                f"it mode: {wanted}."
            )


def total_steps(trainer: L.Trainer) -> int:
    """The meta-iterations of a run, by `max_steps` or else by epochs of limited length; -1 where neither ends it."""
    epochs, limit = trainer.max_epochs, trainer.limit_train_batches
    if trainer.max_steps >= 0 or not isinstance(limit, int) or not epochs or epochs < 0:
        return trainer.max_steps
    return epochs * limit


def tell_of_validation(trainer: Any) -> None:
    """Say where validation waits for the end of an epoch that has none."""
    by_epoch = getattr(trainer, "val_check_interval", None) == 1.0 and trainer.check_val_every_n_epoch is not None
    if by_epoch and not isinstance(trainer.limit_train_batches, int) and trainer.limit_val_batches:
        rank_zero_info(
            "there is no validation in this run, since it comes at the end of an epoch, which is endless: give "
            "trainer.check_val_every_n_epoch=None and trainer.val_check_interval, in meta-iterations, or "
            "trainer.limit_train_batches, those of an epoch."
        )


def check_precision(precision: str | int | None) -> None:
    """Refuse 16-bit floating point, whose range the inner loop's gradients leave; warn of bf16-true."""
    if str(precision) in ("16", "16-mixed", "16-true"):
        raise ValueError(f"trainer.precision={precision} {HALF}")
    if precision == "bf16-true":
        rank_zero_warn("trainer.precision=bf16-true rounds small outer steps away; bf16-mixed does not.")


def _check_launch(trainer: L.Trainer) -> None:
    variable, number = launched_processes()
    if number not in (1, trainer.world_size):
        raise ValueError(
            f"{variable}={number}: this is one of {number} processes, but the trainer knows of {trainer.world_size}, "
            f"so each would train by itself: give trainer.devices and trainer.num_nodes whose product is {number}, "
            f"and trainer.strategy: ddp."
        )


def _check_strategy(trainer: L.Trainer) -> None:
    strategy = trainer.strategy
    if isinstance(strategy, ParallelStrategy) and not isinstance(strategy, DDPStrategy):
        raise ValueError(
            f"trainer.strategy={type(strategy).__name__} keeps a part of the parameters on each device, but the inner "
            f"loop needs all of them for every task: use ddp, which needs a network that fits one device; to save "
            f"memory there, lower model.execution.tasks_per_chunk or adapt a part of the model (model.adapt)."
        )
