"""MAML's gradient from a truncated binomial expansion (BinomMAML, arXiv:2604.13263)."""

from __future__ import annotations

import torch
from torch import Tensor

from fomal.inner.loop import InnerLoop, Trajectory
from fomal.inner.optimizer import InnerOptimizer, times
from fomal.inner.sgd import SGD
from fomal.outer.maml import check_order
from fomal.outer.rule import Expansion, OuterRule, query_expansion
from fomal.utils import tree
from fomal.utils.tree import Tree


class BinomialMAML(OuterRule):
    """MAML with the product over the inner steps of (I - alpha H_j) multiplied out and cut after `order` factors H.

    Order 0 is first-order MAML, order k exact MAML. Unlike `TruncatedMAML` of the same order it has every step's
    Hessian in it. The terms of one degree need each other's results nowhere, so they are computed together, for all
    tasks and steps at once: with k inner steps, T tasks and L = `order` there are L rounds one after the other, round
    l of T (k - l + 1) Hessian-vector products at once; exact MAML takes k rounds of T. So this is more work in fewer
    rounds, which pays where the device has room for it. Memory: k stacked copies of the parameters, and the
    activations of T k Hessian-vector products.

    Args:
        order: the highest number of Hessians in a product, at most `inner_steps`.
    """

    needs_query = True

    def __init__(self, order: int = 1) -> None:
        self.order = order
        self.differentiates = order != 0

    def __call__(self, inner: InnerLoop, start: Tree) -> tuple[Tree, Trajectory]:
        """See `OuterRule`."""
        if not inner.indices:
            trajectory = inner.rollout(start)
            return inner.mean(inner.query_gradients(trajectory.end)), trajectory
        trajectory, before = _rollout(inner, start)
        gradient = inner.query_gradients(trajectory.end)  # (T, ...)
        total = inner.mean(gradient)
        adapted = inner.split(gradient)[0]
        steps, tasks = len(inner.indices), inner.episode.tasks
        x, y = (torch.stack(part) for part in zip(*inner.batches(), strict=True))  # (k, T, B, ...)
        # vectors[i] is the sum of the products of l - 1 factors over the steps after i, applied to the gradient.
        vectors = {name: g.expand(steps, *g.shape) for name, g in adapted.items()}  # (k, T, ...)
        for degree in range(1, self.order + 1):
            last = steps - degree + 1  # later steps have too few steps after them
            at = {name: p[:last].flatten(0, 1) for name, p in before.items()}
            term = self._factors(inner, at, x[:last].flatten(0, 1), y[:last].flatten(0, 1), vectors)
            term = {name: t.view(last, tasks, *t.shape[1:]) for name, t in term.items()}
            total = tree.add(total, inner.mean({name: t.sum(0) for name, t in term.items()}))
            vectors = {name: _sums_from_the_end(t)[1:] for name, t in inner.split(term)[0].items()}
        return total, trajectory

    def _factors(self, inner: InnerLoop, params: Tree, x: Tensor, y: Tensor, vectors: Tree) -> Tree:
        """The derivative of each step's displacement, transposed, times its vector; 0 for what is not adapted."""
        optimizer = inner.optimizer
        assert isinstance(optimizer, SGD)  # see `check`
        flat = {name: v.flatten(0, 1) for name, v in vectors.items()}
        padded = {name: flat[name] if name in flat else torch.zeros_like(p) for name, p in params.items()}
        product = inner.objective.hessian_products(params, x, y, padded)
        if optimizer.weight_decay:
            product = tree.add_scaled(product, padded, optimizer.weight_decay)
        lr = optimizer.lr
        if isinstance(lr, Tensor):
            lr = lr.repeat(len(x) // len(lr))  # steps are in front of tasks
        return {name: -times(lr, p) for name, p in product.items()}

    def expansion(self, inner_steps: int) -> Expansion:
        """As MAML's from order 1 on; first-order MAML's for order 0."""
        return query_expansion(inner_steps, inner_steps if self.order else 0)

    def check(self, inner_steps: int, optimizer: InnerOptimizer) -> None:
        """Also refuse an order beyond the inner steps, and inner optimisers whose steps are no (I - alpha H)."""
        super().check(inner_steps, optimizer)
        check_order(self.order, inner_steps)
        if not isinstance(optimizer, SGD) or optimizer.momentum:
            raise ValueError(
                f"BinomialMAML expands the steps of gradient descent without memory, but inner_optimizer is "
                f"{type(optimizer).__name__}{' with momentum' if isinstance(optimizer, SGD) else ''}: use "
                f"fomal.inner.SGD with momentum: 0, or the rule MAML or TruncatedMAML."
            )


def _rollout(inner: InnerLoop, start: Tree) -> tuple[Trajectory, Tree]:
    """The trajectory, and the parameters before each step, (k, T, ...)."""
    steps = list(inner.steps(start))
    losses = torch.stack([step.loss for step in steps])
    before = {name: torch.stack([step.before[name] for step in steps]) for name in start}
    return Trajectory(steps[-1].after, steps[-1].state, losses, {}), before


def _sums_from_the_end(t: Tensor) -> Tensor:
    """Entry i is the sum of the entries from i on, along the first axis."""
    return t.flip(0).cumsum(0).flip(0)
