"""Looks at a trainer's settings, and at the weights before they are used."""

from __future__ import annotations

from abc import abstractmethod

import lightning as L

from fomal.learner.preflight import check_epochs, check_outer_step
from fomal.tasks.datamodule import EpisodeDataModule


class Guarded(L.LightningModule):
    """A module whose meta-iterations are the trainer's steps, and whose weights are finite where it is used."""

    @abstractmethod
    def refuse_nonfinite(self) -> None:
        """Raise FloatingPointError, naming the parameter, where a weight is infinite or NaN."""

    def configure_callbacks(self) -> list[L.Callback]:
        """None; Lightning asks before it looks at the trainer's settings itself, whose advice cannot be followed."""
        if self.trainer.state.fn == "fit":
            check_outer_step(self.trainer)
            if isinstance(getattr(self.trainer, "datamodule", None), EpisodeDataModule):
                check_epochs(self.trainer)
        return []

    def on_validation_start(self) -> None:
        """Refuse weights that are not finite."""
        self.refuse_nonfinite()

    def on_test_start(self) -> None:
        """Refuse weights that are not finite."""
        self.refuse_nonfinite()

    def on_predict_start(self) -> None:
        """Refuse weights that are not finite."""
        self.refuse_nonfinite()
