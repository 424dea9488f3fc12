"""Refuse, before any work, what cannot run."""

from __future__ import annotations

import lightning as L
from lightning.pytorch.strategies import DDPStrategy, ParallelStrategy

from fomal.distributed import launched_processes, leave_at_exit
from fomal.output import rank_zero_warn

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
            f"memory there, lower model.tasks_per_chunk or adapt a part of the model (model.adapt)."
        )
