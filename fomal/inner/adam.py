"""Adam (Kingma & Ba 2015); the released Reptile code uses it with beta1 = 0."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from fomal.inner.optimizer import SHARED, InnerOptimizer, State, times
from fomal.utils import tree
from fomal.utils.checks import nonnegative, one_of
from fomal.utils.tree import Tree


class Adam(InnerOptimizer):
    """Adam, as `torch.optim.Adam`; with the default beta1 = 0 it keeps no first moment.

    Args:
        lr: step size.
        beta1: decay of the first moment, in [0, 1).
        beta2: decay of the second moment, in [0, 1).
        eps: added to the root of the second moment.
        eps_root: added under the root; above 0 the step is differentiable where a gradient is zero, as MAML needs.
        weight_decay: L2 penalty.
        epsilon: "torch" adds eps to the root of the second moment after its bias is corrected; "tensorflow" before, as
            TensorFlow 1's Adam does (the epsilon hat of Kingma & Ba 2015, section 2), and so the released code.
    """

    def __init__(
        self,
        lr: float = 1e-3,
        beta1: float = 0.0,
        beta2: float = 0.999,
        eps: float = 1e-8,
        eps_root: float = 0.0,
        weight_decay: float = 0.0,
        epsilon: Literal["torch", "tensorflow"] = "torch",
    ) -> None:
        one_of(("torch", "tensorflow"), epsilon=epsilon)
        nonnegative(lr=lr, beta1=beta1, beta2=beta2, eps=eps, eps_root=eps_root, weight_decay=weight_decay)
        for name, beta in {"beta1": beta1, "beta2": beta2}.items():
            if beta >= 1:
                raise ValueError(f"{name}={beta} must be below 1.")
        self.lr: float | Tensor = lr
        self.beta1, self.beta2 = beta1, beta2
        self.eps, self.eps_root, self.weight_decay = eps, eps_root, weight_decay
        self.epsilon = epsilon
        self.differentiable = eps_root > 0

    def init(self, params: Mapping[str, Tensor]) -> State:
        """Zero moments and a step count of zero."""
        device = next(iter(params.values())).device
        state: State = {
            SHARED: {"steps": torch.zeros((), dtype=torch.float64, device=device)},
            "second_moment": {name: torch.zeros_like(p) for name, p in params.items()},
        }
        if self.beta1:
            state["first_moment"] = {name: torch.zeros_like(p) for name, p in params.items()}
        return state

    def update(self, gradient: Tree, state: State, params: Tree) -> tuple[Tree, State]:
        """One step."""
        if self.weight_decay:
            gradient = tree.add_scaled(gradient, params, self.weight_decay)
        steps = state[SHARED]["steps"] + 1
        second = {
            name: torch.addcmul(v * self.beta2, gradient[name], gradient[name], value=1 - self.beta2)
            for name, v in state["second_moment"].items()
        }
        updated: State = {SHARED: {"steps": steps}, "second_moment": second}
        first = gradient
        if self.beta1:
            first = {name: torch.lerp(m, gradient[name], 1 - self.beta1) for name, m in state["first_moment"].items()}
            updated["first_moment"] = first
        correction1 = _bias_correction(self.beta1, steps)
        correction2 = _bias_correction(self.beta2, steps)
        step_size, root = self.lr / correction1, correction2.rsqrt()
        moved = {}
        for name, p in params.items():
            variance = second[name] + self.eps_root if self.eps_root else second[name]
            eps = self.eps if self.epsilon == "torch" else self.eps * root.to(p.dtype)
            direction = first[name] / (variance.sqrt() * root.to(p.dtype) + eps)
            moved[name] = p - times(step_size, direction)
        return moved, updated


def _bias_correction(beta: float, steps: Tensor) -> Tensor:
    """1 - beta ** steps, in float64 so that it keeps its digits for beta near 1."""
    return -torch.expm1(steps * math.log(beta)) if beta else torch.ones_like(steps)
