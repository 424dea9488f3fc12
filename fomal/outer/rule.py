"""The outer rule: from the inner loops of a meta-batch to the outer gradient."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

from fomal.inner.loop import InnerLoop, Trajectory
from fomal.inner.optimizer import InnerOptimizer
from fomal.utils.checks import MANY, countable
from fomal.utils.tree import Tree


class Expansion(NamedTuple):
    """The leading terms of an outer gradient for small inner step sizes (Nichol et al. 2018, section 5.1).

    With g_j and H_j the gradient and the Hessian of the loss on mini-batch j, both at the initialisation, and inner
    SGD of step size alpha, a task's outer gradient, divided by alpha where it is made of displacements, is

        sum_j gradients[j] g_j - alpha sum_ij products[i][j] H_i g_j + O(alpha^2).

    Attributes:
        gradients: n coefficients, one for each mini-batch; of rules with a query set that is the last.
        products: n rows of n coefficients.
        of_displacements: whether the outer gradient is made of the inner steps' displacements.
    """

    gradients: list[float]
    products: list[list[float]]
    of_displacements: bool

    @property
    def avg_grad(self) -> float:
        """The coefficient of AvgGrad = E[g_1], over exchangeable mini-batches."""
        return sum(self.gradients)

    @property
    def avg_grad_inner(self) -> float:
        """The coefficient of -alpha AvgGradInner, AvgGradInner = E[H_2 g_1]."""
        return sum(map(sum, self.products))


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
            The outer gradient, shaped as `start`, for any torch optimiser to *descend*; parameters that the rule has
            nothing to say about may be missing. And the trajectory.
        """

    def expansion(self, inner_steps: int) -> Expansion | None:
        """The leading terms of this rule's outer gradient; None where they are not known."""
        return None

    def check(self, inner_steps: int, optimizer: InnerOptimizer) -> None:
        """Raise ValueError, naming argument and remedy, where the rule cannot work with these settings."""
        countable(MANY, **{"model.train.steps": inner_steps})
        if not inner_steps and not self.needs_query:
            raise ValueError(
                f"model.train.steps=0 leaves {type(self).__name__} nothing, which is made of the inner steps: use 1 or "
                f"more, or a rule with a query set, e.g. QueryFOMAML."
            )
        if self.tail_shots is not None and inner_steps < 2:
            raise ValueError(
                f"model.train.steps={inner_steps} leaves no step before the separate tail: use 2 or more "
                f"or tail_shots: null."
            )
        if self.differentiates and not optimizer.differentiable:
            raise ValueError(
                f"{type(self).__name__} differentiates through {type(optimizer).__name__}, whose derivative is "
                f"infinite where a gradient is zero: use inner SGD, or set eps_root above 0 (e.g. 1e-8)."
            )


def step_expansion(weights: list[float]) -> Expansion:
    """The leading terms of weighted displacements; the gradient of step j is g_j - alpha sum_(i<j) H_j g_i."""
    products = [[weight if i < j else 0.0 for i in range(len(weights))] for j, weight in enumerate(weights)]
    return Expansion(list(weights), products, of_displacements=True)


def query_expansion(inner_steps: int, order: int) -> Expansion:
    """The leading terms of a query gradient, back-propagated through the last `order` inner steps.

    The gradient at the end is g_q - alpha sum_i H_q g_i; each step i that is gone back through adds -alpha H_i g_q.
    """
    n = inner_steps + 1
    products = [[0.0] * n for _ in range(n)]
    products[-1] = [1.0] * inner_steps + [0.0]
    for i in range(inner_steps - order, inner_steps):
        products[i][-1] = 1.0
    return Expansion([0.0] * inner_steps + [1.0], products, of_displacements=False)
