"""One inner step of all tasks, compiled."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fomal.checks import first_line
from fomal.inner.objective import Objective
from fomal.inner.optimizer import SHARED, InnerOptimizer, State
from fomal.tree import Tree, difference

log = logging.getLogger(__name__)

Stepped = tuple[Tree, State, Tensor]
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}
"""How far a compiled step's gradients and losses may be off, relative to their norm: compilers sum in another order."""


def plain_step(
    objective: Objective, optimizer: InnerOptimizer, params: Tree, state: State, batch: Any, common: Tree
) -> Any:
    """One step of stacked parameters on the mini-batch (x, y): new parameters, new state, gradient and losses (T,)."""
    x, y = batch
    gradient, loss = objective.gradients(params, x, y, common)
    moved, state = optimizer.update(gradient, state, params)
    return moved, state, gradient, loss


class CompiledStep:
    """`torch.compile` around the gradient of all tasks and the optimiser's update, for one learner.

    The first step of each new shape takes tens of seconds, and is compared with the plain one; where it cannot be
    compiled, or differs, steps are plain from then on, and one line says why. Results differ from plain ones by
    rounding.
    """

    def __init__(self, objective: Objective) -> None:
        self.objective = objective
        self.reason = ""  # why steps are plain
        self._compiled: dict[int, Callable[..., Any]] = {}  # by optimiser
        self._proven: set[Any] = set()

    def __call__(self, optimizer: InnerOptimizer, params: Tree, state: State, batch: Any, common: Tree) -> Stepped:
        """One step."""
        arguments = (params, state, batch, common)
        if not self.reason:
            # The first step has all tasks' parameters in one place, which would be one more shape.
            arguments = (_own(params), _own_state(state), batch, _own(common))
            found = self._try(optimizer, arguments)
            if found is not None:
                return found
        moved, after, _, loss = plain_step(self.objective, optimizer, *arguments)
        return moved, after, loss

    def _try(self, optimizer: InnerOptimizer, arguments: Any) -> Stepped | None:
        if id(optimizer) not in self._compiled:
            function = torch.compile(lambda *a: plain_step(self.objective, optimizer, *a), dynamic=False)
            self._compiled[id(optimizer)] = function
        shape = (id(optimizer), arguments[2][0].shape, arguments[2][0].dtype, torch.is_grad_enabled())
        try:
            moved, state, gradient, loss = self._compiled[id(optimizer)](*arguments)
        except torch.OutOfMemoryError:  # says nothing about the compiler
            raise
        except Exception as error:  # the compiler raises many kinds, e.g. without a C++ compiler
            self._give_up(first_line(error))
            return None
        if shape not in self._proven:
            _, _, expected, losses = plain_step(self.objective, optimizer, *arguments)
            if reason := _difference({**gradient, "": loss}, {**expected, "": losses}):
                self._give_up(reason)
                return None
            self._proven.add(shape)
        return moved, state, loss

    def _give_up(self, reason: str) -> None:
        self.reason = reason
        log.warning("Inner steps of %s are not compiled: %s", type(self.objective.network).__name__, reason)


def _difference(found: Tree, expected: Tree) -> str:
    error, scale = difference(found, expected)
    tolerance = TOLERANCE.get(next(iter(expected.values())).dtype, 0.1)
    return "" if error <= tolerance * scale else f"the compiled gradient is off by {error / scale:.1e} of its norm"


def _own(tree: Tree) -> Tree:
    return {name: t.contiguous() for name, t in tree.items()}


def _own_state(state: State) -> State:
    return {part: values if part == SHARED else _own(values) for part, values in state.items()}
