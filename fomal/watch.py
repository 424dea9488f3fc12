"""What a run looks out for in every meta-iteration: signals to stop, and values that are not finite."""

from __future__ import annotations

import signal
from collections.abc import Callable

import torch
from torch import Tensor

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
LOOK_EVERY = 10  # meta-iterations between looks at what a GPU has found, since each look waits for it


class Watch:
    """Collects on the device, and looks there each time on a CPU and every `LOOK_EVERY` meta-iterations elsewhere.

    All processes look at the same time at the same sums, so that they stop together.

    Attributes:
        asked: the signal by which this process has been asked to stop; 0 for none.
        stopping: the signal by which all processes stop before the next meta-iteration; 0 for none.
    """

    def __init__(self) -> None:
        self.asked = self.stopping = 0
        self._finite = torch.tensor(True)
        self._sent: list[float] = []
        self._flags = torch.empty(0)

    def ends(self, processes: int) -> int:
        """The signal by which a run of so many processes stops before the next meta-iteration; 0 for none."""
        return self.stopping if processes > 1 else self.asked

    def flags(self, device: torch.device) -> Tensor:
        """(3,): for each signal, whether this process has been asked by it; to be added over processes."""
        flags = [float(self.asked == number) for number in STOP_SIGNALS]
        if self._flags.device != device or self._sent != flags:
            self._sent, self._flags = flags, torch.tensor(flags, device=device)
        return self._flags

    def look(self, flags: Tensor, finite: Tensor, step: int, bad_episodes: Callable[[], list[int]]) -> None:
        """Take in a meta-iteration.

        Args:
            flags: the sums of `flags` over processes.
            finite: (), bool: whether all of the meta-iteration's values are finite.
            step: its number.
            bad_episodes: finds the episodes of this process that are not; called only where there is one.

        Raises:
            FloatingPointError: see `refuse_nonfinite`.
        """
        self._finite = self._finite.to(finite.device) & finite
        at_once = finite.device.type == "cpu"
        if at_once or step % LOOK_EVERY == 0:
            asked = [number for number, n in zip(STOP_SIGNALS, flags.tolist(), strict=True) if n]
            self.stopping = max(asked, default=0)
            self.refuse_nonfinite(step, bad_episodes if at_once else None)

    def refuse_nonfinite(self, step: int, bad_episodes: Callable[[], list[int]] | None = None) -> None:
        """Raise FloatingPointError if a meta-iteration since the last look has a value that is infinite or NaN."""
        if self._finite:
            return
        self._finite = torch.tensor(True)
        where = "in a meta-iteration shortly before"
        if bad_episodes is not None:
            numbers = ", ".join(map(str, bad_episodes()))
            where = f"of training episode {numbers}" if numbers else "of another process's task"
        raise FloatingPointError(
            f"meta-iteration {step}: the loss, gradient or inner state {where} is not finite: lower "
            f"model.inner_optimizer.lr or the outer step size, or leave such tasks out with model.on_nonfinite: "
            f"skip_task."
        )
