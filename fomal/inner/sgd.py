"""Stochastic gradient descent with momentum and weight decay."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fomal.inner.optimizer import InnerOptimizer, State, descend
from fomal.utils import tree
from fomal.utils.checks import nonnegative
from fomal.utils.tree import Tree


class SGD(InnerOptimizer):
    """p <- p - lr b with b <- momentum b + g + weight_decay p, as `torch.optim.SGD` without dampening.

    Args:
        lr: step size.
        momentum: share of the last step's direction that is kept.
        weight_decay: L2 penalty.
    """

    def __init__(self, lr: float = 0.01, momentum: float = 0.0, weight_decay: float = 0.0) -> None:
        nonnegative(lr=lr, momentum=momentum, weight_decay=weight_decay)
        self.lr: float | Tensor = lr
        self.momentum, self.weight_decay = momentum, weight_decay

    def init(self, params: Mapping[str, Tensor]) -> State:
        """Zero momentum; no state at all without momentum."""
        return {"momentum": {name: torch.zeros_like(p) for name, p in params.items()}} if self.momentum else {}

    def update(self, gradient: Tree, state: State, params: Tree) -> tuple[Tree, State]:
        """One step."""
        if self.weight_decay:
            gradient = tree.add_scaled(gradient, params, self.weight_decay)
        if self.momentum:
            gradient = tree.add_scaled(gradient, state["momentum"], self.momentum)
            state = {"momentum": gradient}
        return descend(params, self.lr, gradient), state
