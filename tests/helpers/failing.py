"""A callback with which a run fails."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.callbacks import Callback


class Fail(Callback):
    """Fails where it is told to, or after so many meta-iterations."""

    def __init__(self, at: int | str) -> None:
        self.at = at
        if isinstance(at, str):
            setattr(self, at, self.fail)

    def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step == self.at:
            self.fail()

    def fail(self, *args: Any, **kwargs: Any) -> None:
        raise ValueError("no")
