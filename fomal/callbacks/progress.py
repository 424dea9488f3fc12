"""A progress bar that counts meta-iterations."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar
from rich.console import RenderableType
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from fomal.evaluation.figures import read_figures
from fomal.learner.meta_learner import MetaLearner
from fomal.learner.replicas import Replicas
from fomal.utils.terminal import PlainConsole, logs_to_stderr


class MetaProgressBar(ProgressBar):
    """Shows the meta-iteration, the rate, the time left and the last validation result.

    On a terminal it is a bar; elsewhere (a log file) a line every so many seconds and after each validation.

    Args:
        refresh: seconds between updates of the bar.
        line_every: seconds between lines where there is no terminal.
    """

    def __init__(self, refresh: float = 0.5, line_every: float = 60.0) -> None:
        super().__init__()
        self.refresh, self.line_every = refresh, line_every
        self._enabled = True
        self._bar: _Bar | None = None
        self._console = PlainConsole(soft_wrap=True)  # a path or a command stays whole when it is copied
        self._logs = ExitStack()
        self._done, self._last_shown = 0, (0, "")
        self._last_time = self._last_step = self._rate = 0.0

    def enable(self) -> None:
        """Show."""
        self._enabled = True

    def disable(self) -> None:
        """Show nothing, e.g. in every process but the first."""
        self._enabled = False

    # -- training

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the bar at the present meta-iteration."""
        self._open("meta-iterations", trainer.max_steps if trainer.max_steps > 0 else None, trainer.global_step)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move on, a few times a second at most."""
        self._advance(trainer.global_step, self._validation_figures(trainer))

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Show the new validation result."""
        if trainer.state.fn != "fit":
            self._finish(self._done)
        elif not trainer.sanity_checking:
            self._last_time = time.monotonic()  # the time that validation took is not the rate's
            self._advance(trainer.global_step, self._validation_figures(trainer), force=True)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave the bar at its end."""
        self._finish(trainer.global_step, self._validation_figures(trainer))

    # -- evaluation

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Count validation batches, unless in the midst of training."""
        if trainer.state.fn != "fit":
            self._open("batches of tasks", _total(trainer.num_val_batches), 0)
        elif not trainer.sanity_checking:
            self._measure(trainer.global_step)

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Count test batches."""
        self._open("batches of tasks", _total(trainer.num_test_batches), 0)

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Count prediction batches."""
        self._open("batches of tasks", _total(trainer.num_predict_batches), 0)

    def on_validation_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        """Move on."""
        if trainer.state.fn != "fit":
            self._evaluated()

    def on_test_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        """Move on."""
        self._evaluated()

    def on_predict_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        """Move on."""
        self._evaluated()

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave the bar at its end."""
        self._finish(self._done)

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave the bar at its end."""
        self._finish(self._done)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Free the terminal."""
        self._close()

    # -- drawing

    def _evaluated(self) -> None:
        self._done += 1
        self._advance(self._done, "")

    def _validation_figures(self, trainer: L.Trainer) -> str:
        module, values = trainer.lightning_module, trainer.callback_metrics
        learner = module.learners[0] if isinstance(module, Replicas) else module  # means are logged of replicas
        about = learner.results.get("figures", {}) if isinstance(learner, MetaLearner) else {}
        shown = read_figures(about, [name for name in about if name in values], "results")
        headline = {name: one for name, one in shown.items() if one.is_headline}
        return "  ".join(f"{name} {one.with_unit(float(values[name]))}" for name, one in headline.items())

    def _open(self, what: str, total: int | None, start: int) -> None:
        self._last_time, self._last_step, self._rate = time.monotonic(), float(start), 0.0
        self._what, self._total, self._done = what, total, 0
        self._last_shown = (start, "")
        if self._enabled and self._console.is_terminal and not self._console.is_dumb_terminal:
            self._bar = _Bar(self._console)
            goal = "" if total is None else f"/{total}"
            self._bar.add_task(what, total=total, completed=start, goal=goal, rate="")
            self._bar.start()
            self._logs.enter_context(logs_to_stderr())

    def _advance(self, step: int, note: str, force: bool = False) -> None:
        passed = time.monotonic() - self._last_time
        due = self.refresh if self._bar else self.line_every
        if not self._enabled or (passed < due and not force):
            return
        self._last_shown = (step, note)
        self._measure(step)
        rate = f"{self._rate:.1f}/s" if self._rate >= 1 or not self._rate else f"{1 / self._rate:.2f} s each"
        if self._bar:
            self._bar.note = note
            self._bar.update(self._bar.task_ids[0], completed=step, rate=rate, refresh=True)
        else:
            goal = "" if self._total is None else f"/{self._total}"
            print(f"{self._what} {step}{goal}  {rate}  {note}".rstrip(), flush=True)

    def _measure(self, step: int) -> None:
        now = time.monotonic()
        if step > self._last_step and now > self._last_time:
            self._rate = (step - self._last_step) / (now - self._last_time)
        self._last_time, self._last_step = now, float(step)

    def _finish(self, step: int, note: str = "") -> None:
        """Show the end, unless it is shown already."""
        if self._last_shown != (step, note):
            self._advance(step, note, force=True)
        self._close()

    def _close(self) -> None:
        if self._bar:
            self._logs.close()
            self._bar.stop()
            self._bar = None


class _Bar(Progress):
    """A line that counts, and one of figures below it; what is printed meanwhile goes above them."""

    note = ""

    def __init__(self, console: PlainConsole) -> None:
        columns = (
            TextColumn("{task.description} {task.completed:.0f}{task.fields[goal]}", markup=False),
            BarColumn(bar_width=None),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[rate]}", markup=False),
        )
        # Messages that go to a file stay out of the terminal.
        together = sys.stderr.isatty()
        super().__init__(*columns, console=console, auto_refresh=False, redirect_stderr=together, expand=True)

    def get_renderables(self) -> Iterable[RenderableType]:
        """Give the two lines."""
        yield self.make_tasks_table(self.tasks)
        if self.note:
            yield Text(self.note, overflow="ellipsis", no_wrap=True)


def _total(batches: Sequence[int | float]) -> int | None:
    """The batches of all loaders; None where that is not known."""
    total = sum(batches)
    return int(total) if math.isfinite(total) else None
