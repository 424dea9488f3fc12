"""Inner optimisers as pure functions of (gradient, state, parameters)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

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
        lr: step size; or (T,) of them, one for each of T stacked tasks.
    """

    lr: float | Tensor

    differentiable: bool = True
    """Tell whether `update` has finite derivatives everywhere, as rules that differentiate the inner loop need."""

    def for_tasks(self, seed: int, split: int, number: Tensor) -> InnerOptimizer:
        """This optimiser for the episodes `number` (T,) of a stream: an optimiser with noise samples it by them."""
        return self

    @abstractmethod
    def init(self, params: Mapping[str, Tensor]) -> State:
        """The state before the first step, for parameters of these shapes."""

    @abstractmethod
    def update(self, gradient: Tree, state: State, params: Tree) -> tuple[Tree, State]:
        """One step: the new parameters and the new state. Nothing is changed in place."""


def times(rate: float | Tensor, t: Tensor) -> Tensor:
    """`rate` times t (T, ...): a number, (), or one for each task, (T,)."""
    return (tree.beside(rate, t) if isinstance(rate, Tensor) else rate) * t


def descend(params: Tree, rate: float | Tensor, direction: Tree) -> Tree:
    """Parameters (T, ...) less `rate` times the direction, see `times`."""
    if isinstance(rate, Tensor):
        return {name: p - times(rate, direction[name]) for name, p in params.items()}
    return tree.add_scaled(params, direction, -rate)
