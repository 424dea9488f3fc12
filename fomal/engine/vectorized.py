"""Functions of one task for many tasks: vectorised with `torch.func.vmap`, or in a loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from fomal.engine.backend import Backend, deviation, in_float64
from fomal.engine.functional import full_precision, plain_attention
from fomal.utils.pytree import leaves, map_leaves, stack

WIDE_TOLERANCE = 1e-6
"""How far vectorised derivatives may be off in float64, relative to the norm."""
NARROW_TOLERANCE = 1e-2
"""Likewise in less, where the network cannot be computed in float64."""


def over_tasks(function: Callable[..., Any], vectorize: bool) -> Callable[..., Any]:
    """The function of arguments of many tasks, these in front of all tensors, that is `function` of those of each."""
    if vectorize:
        vectorised = torch.func.vmap(function, randomness="different")

        def vectorised_over_tasks(*args: Any) -> Any:
            with plain_attention(kernels=leaves(args)[0].device.type == "cpu"):
                return vectorised(*args)

        return vectorised_over_tasks

    def looped(*args: Any) -> Any:
        tasks = len(leaves(args[-1])[0])
        return stack([function(*map_leaves(lambda t, i=i: t[i], args)) for i in range(tasks)])

    return looped


class Vectorized(Backend):
    """Decides whether functions of a network can be vectorised, by derivatives for two tasks beside those of a loop.

    Both are computed in float64, in which two right ways hardly differ, or else with the full precision of what is at
    hand, and with the network in evaluation, where no dropout makes them differ.

    Args:
        network: any module.
        name: of all that the functions use, for the message.
    """

    def __init__(self, network: nn.Module, name: str) -> None:
        line = f"{name} cannot be vectorised over tasks, so tasks run one after the other (slower, same results): %s; "
        line += "model.execution.vectorize: false says so beforehand, true vectorises them all the same"
        super().__init__(network, line)

    def can(
        self, looped: Callable[..., Any], vectorised: Callable[..., Any], args: Any, second_order: bool
    ) -> bool | None:
        """Tell whether all can be vectorised; None where a derivative is infinite or NaN, which tells nothing.

        Args:
            looped: gradients of tasks `args` in a loop, with `second_order` each followed by a second derivative.
            vectorised: likewise, by `torch.func.vmap`.
            args: for two tasks.
            second_order: see `looped`.
        """
        wide: Any = None

        def expect() -> Any:
            nonlocal wide
            with self._compared(leaves(args)[0].device):
                wide = in_float64(looped, args)
                return looped(*args) if wide is None else wide[1]  # an error of the network itself is raised here

        def prove(expected: Any) -> bool:
            with self._compared(leaves(args)[0].device):
                trial, tolerance = (args, NARROW_TOLERANCE) if wide is None else (wide[0], WIDE_TOLERANCE)
                off = deviation(vectorised(*trial), expected, whole=tolerance)
            if off:
                what = "second derivative" if second_order and off[0] % 2 else "gradient"
                raise ValueError(f"its vectorised {what} is off by {off[1]:.1e} of its norm")
            vectorised(*args)  # as in training, where there may be random operations that vmap refuses
            return True

        self.forget()
        self.reason = ""
        with plain_attention() if second_order else nullcontext():  # which can be differentiated twice
            found: bool | None = self.way(second_order, expect, prove)
        return False if self.reason else found

    @contextmanager
    def _compared(self, device: torch.device) -> Iterator[None]:
        """Compute with the network in evaluation, and in full precision: rounding is not what is looked for."""
        modes = [(module, module.training) for module in self.network.modules()]
        self.network.eval()
        try:
            with torch.autocast(device.type, enabled=False), full_precision(device):
                yield
        finally:
            for module, mode in modes:
                module.training = mode
