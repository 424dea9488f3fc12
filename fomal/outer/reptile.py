"""Reptile (Nichol, Achiam & Schulman 2018, algorithm 2)."""

from __future__ import annotations

from fomal.inner.loop import InnerLoop, Trajectory
from fomal.outer.rule import Expansion, OuterRule, step_expansion
from fomal.utils import tree
from fomal.utils.tree import Tree


class Reptile(OuterRule):
    """Outer gradient phi - mean_t W_t: with outer SGD of step size eps, phi moves to phi + eps mean_t(W_t - phi)."""

    def __call__(self, inner: InnerLoop, start: Tree) -> tuple[Tree, Trajectory]:
        """See `OuterRule`."""
        trajectory = inner.rollout(start)
        return tree.subtract(inner.split(start)[0], inner.mean(trajectory.end)), trajectory

    def expansion(self, inner_steps: int) -> Expansion:
        """Divided by alpha: k AvgGrad - k (k - 1) / 2 alpha AvgGradInner."""
        return step_expansion([1.0] * inner_steps)
