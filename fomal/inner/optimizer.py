"""Inner optimisers as pure functions of (gradient, state, parameters)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fomal.utils import tree
from fomal.utils.tree import Tree

State = dict[str, Tree]
"""Named parameter dicts, e.g. {"second_moment": {...}}; counters, which all tasks share, are in "shared"."""

SHARED = "shared"


class InnerOptimizer(ABC):
    """An optimiser of the inner loop.

    Works elementwise, so the same code serves one task and tasks stacked along a leading axis.

    Attributes:
        lr: step size; or (R,) of them, each for T / R of T stacked tasks in a row, see `times`.
    """

    lr: float | Tensor

    differentiable: bool = True
    """Whether `update` has finite derivatives everywhere, as rules that differentiate the inner loop need."""

    def for_tasks(self, seed: int, split: int, number: Tensor) -> InnerOptimizer:
        """This optimiser for the episodes `number` (T,) of a stream: an optimiser with noise draws it by them."""
        return self

    @abstractmethod
    def init(self, params: Mapping[str, Tensor]) -> State:
        """The state before the first step, for parameters of these shapes."""

    @abstractmethod
    def update(self, gradient: Tree, state: State, params: Tree) -> tuple[Tree, State]:
        """One step: the new parameters and the new state. Nothing is changed in place."""


def join_states(states: Sequence[State]) -> State:
    """States of the same kind, stacked along a new first axis; counters must be the same in all."""
    return {
        part: values
        if part == SHARED
        else {name: torch.stack([state[part][name] for state in states]) for name in values}
        for part, values in states[0].items()
    }


def part_of_state(state: State, place: int) -> State:
    """One of the states that `join_states` has stacked."""
    return {
        part: values if part == SHARED else {name: t[place] for name, t in values.items()}
        for part, values in state.items()
    }


def times(rate: float | Tensor, t: Tensor) -> Tensor:
    """`rate` times stacked t (T, ...): a number, or numbers (R,) of which each is that of T / R tasks in a row."""
    if not isinstance(rate, Tensor) or not rate.dim():
        return rate * t if not isinstance(rate, Tensor) else rate.to(t.dtype) * t
    each = rate.to(t.dtype).repeat_interleave(len(t) // len(rate))
    return each.view(-1, *[1] * (t.dim() - 1)) * t


def descend(params: Tree, rate: float | Tensor, direction: Tree) -> Tree:
    """Parameters (T, ...) less `rate` times the direction, see `times`."""
    if isinstance(rate, Tensor):
        return {name: p - times(rate, direction[name]) for name, p in params.items()}
    return tree.add_scaled(params, direction, -rate)
