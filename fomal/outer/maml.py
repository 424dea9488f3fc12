"""MAML (Finn, Abbeel & Levine 2017), exact, and truncated to the last inner steps."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fomal.inner.loop import InnerLoop, Trajectory
from fomal.inner.optimizer import InnerOptimizer
from fomal.outer.rule import Expansion, OuterRule, query_expansion
from fomal.utils import tree
from fomal.utils.tree import Tree


class MAML(OuterRule):
    """Outer gradient d/dphi mean_t L_query(W_t(phi)), differentiated through every inner step.

    Memory grows with the number of inner steps, since the whole inner loop stays in the graph.
    """

    needs_query = True
    differentiates = True

    def __call__(self, inner: InnerLoop, start: Tree) -> tuple[Tree, Trajectory]:
        """See `OuterRule`."""
        return back_propagate(inner, start, len(inner.indices))

    def expansion(self, inner_steps: int) -> Expansion:
        """AvgGrad and -2 k alpha AvgGradInner for k inner steps (section 5.1)."""
        return query_expansion(inner_steps, inner_steps)


class TruncatedMAML(OuterRule):
    """MAML, differentiated through the last `order` inner steps alone (Shaban et al. 2019, truncated back-propagation).

    Order 0 is first-order MAML, order k exact MAML. With k inner steps it takes k + 1 gradients and `order`
    Hessian-vector products, one after the other, and keeps the graph of `order` steps in memory.

    Args:
        order: how many of the inner steps to go back through, at most `inner_steps`.
    """

    needs_query = True

    def __init__(self, order: int = 1) -> None:
        self.order = order
        self.differentiates = order != 0

    def __call__(self, inner: InnerLoop, start: Tree) -> tuple[Tree, Trajectory]:
        """See `OuterRule`."""
        return back_propagate(inner, start, self.order)

    def expansion(self, inner_steps: int) -> Expansion:
        """AvgGrad and -(k + order) alpha AvgGradInner for k inner steps."""
        return query_expansion(inner_steps, self.order)

    def check(self, inner_steps: int, optimizer: InnerOptimizer) -> None:
        """Also refuse an order beyond the inner steps."""
        super().check(inner_steps, optimizer)
        check_order(self.order, inner_steps)


def check_order(order: int, inner_steps: int) -> None:
    """Raise ValueError for an order that is negative or exceeds the number of inner steps."""
    if isinstance(order, bool) or not isinstance(order, int) or not 0 <= order <= inner_steps:
        raise ValueError(
            f"order={order} must be from 0 (first order) to model.train.steps={inner_steps} (exact): change one."
        )


def back_propagate(inner: InnerLoop, start: Tree, order: int) -> tuple[Tree, Trajectory]:
    """The mean gradient of the query losses with respect to the parameters before the last `order` inner steps.

    Parameters that are not adapted are the same in every step; their gradient goes through those last steps too.
    """
    cut = len(inner.indices) - order
    begun = replace(inner, indices=inner.indices[:cut]).rollout(start)
    rest = replace(inner, indices=inner.indices[cut:])

    def query_loss(middle: Tree, start: Tree) -> tuple[Tensor, Trajectory]:
        trajectory = rest.rollout(start, onward=begun._replace(end=middle))
        return inner.task_mean(inner.query_losses(trajectory.end)).sum(), trajectory

    (by_middle, by_start), trajectory = torch.func.grad(query_loss, argnums=(0, 1), has_aux=True)(begun.end, start)
    return tree.add(by_start, {name: inner.task_sum(t) for name, t in by_middle.items()}), trajectory
