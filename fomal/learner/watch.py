"""The dangers that a run looks out for in every meta-iteration: signals to stop, and values that are not finite."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fomal.utils.checks import some

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
            f"model.inner_optimizer.lr or the outer step size, or leave such tasks out with model.outer.on_nonfinite: "
            f"skip_task."
        )


def nonfinite(tensors: Iterable[tuple[str, Tensor]]) -> list[str]:
    """The names of the tensors that hold an infinite value or NaN; waits for the device once."""
    floating = [(name, t.detach()) for name, t in tensors if t.is_floating_point() and t.numel()]
    if not floating:
        return []
    finite = torch.stack([t.isfinite().all() for _, t in floating]).tolist()
    return [name for (name, _), is_finite in zip(floating, finite, strict=True) if not is_finite]


def refuse_nonfinite_weights(network: nn.Module, where: str) -> None:
    """Raise FloatingPointError, naming the parameter, where a network's weights are not finite."""
    if names := nonfinite(network.named_parameters()):
        raise FloatingPointError(
            f"{where}: the network's {some(names)} is infinite or NaN, so training has diverged: use an earlier "
            f"checkpoint, e.g. previous.ckpt, and train with a lower outer step size."
        )


def refuse_nonfinite_state(checkpoint: Mapping[str, Any], carried: Mapping[str, Mapping[str, Tensor]] | None) -> None:
    """Look at what a checkpoint of Lightning's holds beside the weights, before it is written.

    Args:
        checkpoint: with `optimizer_states`, where it has any.
        carried: the inner optimiser's state.

    Raises:
        FloatingPointError: an outer optimiser's state or step size, or the carried state, is infinite or NaN.
    """
    parts = dict(_outer_state(checkpoint))
    parts |= {f"carried {part} of {name}": t for part, values in (carried or {}).items() for name, t in values.items()}
    if names := nonfinite(parts.items()):
        raise FloatingPointError(
            f"meta-iteration {checkpoint['global_step']}: the {some(names)} is infinite or NaN, so no checkpoint is "
            f"written, and earlier ones stay: lower the outer step size or model.inner_optimizer.lr."
        )


def _outer_state(checkpoint: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    for optimizer in checkpoint.get("optimizer_states", []):
        for group in optimizer["param_groups"]:
            yield "outer step size", torch.as_tensor(group["lr"], dtype=torch.float64)
        for number, values in optimizer["state"].items():
            for name, value in values.items():
                if isinstance(value, Tensor):
                    yield f"outer optimiser's {name} of parameter {number}", value
