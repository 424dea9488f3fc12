"""Inner optimisers as pure functions of (gradient, state, parameters)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

from torch import Tensor

from fomal import tree
from fomal.tree import Tree

State = dict[str, Tree]
"""Named parameter dicts, e.g. {"second_moment": {...}}; counters, which all tasks share, are in "shared"."""

SHARED = "shared"


class InnerOptimizer(ABC):
    """An optimiser of the inner loop.

    Works elementwise, so the same code serves one task and tasks stacked along a leading axis.
    """

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


def stack_state(state: State, tasks: int) -> State:
    """The same state for each of `tasks` tasks."""
    return {part: values if part == SHARED else tree.stack(values, tasks) for part, values in state.items()}


def mean_state(state: State) -> State:
    """The mean over the tasks of a stacked state: how carried state leaves a meta-batch."""
    return {part: values if part == SHARED else tree.mean(values) for part, values in state.items()}
