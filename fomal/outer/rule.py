"""What an outer rule is: from the inner loops of a meta-batch to the outer gradient."""

from __future__ import annotations

from abc import ABC, abstractmethod

from fomal.checks import positive
from fomal.inner.optimizer import InnerOptimizer
from fomal.inner.rollout import InnerLoop, Trajectory
from fomal.tree import Tree


class OuterRule(ABC):
    """An outer rule runs the inner loops and says in which direction the initialisation should go.

    Attributes:
        tail_shots: examples per class kept for the last mini-batch alone; None: it is cut like the others.
        needs_query: whether training tasks need a query set.
        differentiates: whether the rule differentiates through the inner loop.
    """

    tail_shots: int | None = None
    needs_query: bool = False
    differentiates: bool = False

    @abstractmethod
    def __call__(self, inner: InnerLoop, start: Tree) -> tuple[Tree, Trajectory]:
        """Adapt from the initialisation `start` and return the outer gradient, the mean over tasks.

        Returns:
            The outer gradient, shaped as `start`, for any torch optimiser to *descend*; and the trajectory.
        """

    def check(self, inner_steps: int, optimizer: InnerOptimizer) -> None:
        """Raise ValueError, naming argument and remedy, where the rule cannot work with these settings."""
        positive(inner_steps=inner_steps)
        if self.tail_shots is not None and inner_steps < 2:
            raise ValueError(
                f"inner_steps={inner_steps} leaves no step before the separate tail: use inner_steps >= 2 "
                f"or tail_shots: null."
            )
        if self.differentiates and not optimizer.differentiable:
            raise ValueError(
                f"{type(self).__name__} differentiates through {type(optimizer).__name__}, whose derivative is "
                f"infinite where a gradient is zero: use inner SGD, or set eps_root above 0 (e.g. 1e-8)."
            )
