"""Reptile (Nichol, Achiam & Schulman 2018, algorithm 2)."""

from __future__ import annotations

from fomal import tree
from fomal.inner.rollout import InnerLoop, Trajectory
from fomal.outer.rule import OuterRule
from fomal.tree import Tree


class Reptile(OuterRule):
    """Outer gradient phi - mean_t W_t: with outer SGD of step size eps, phi moves to phi + eps mean_t(W_t - phi)."""

    def __call__(self, inner: InnerLoop, start: Tree) -> tuple[Tree, Trajectory]:
        """See `OuterRule`."""
        trajectory = inner.rollout(start)
        return tree.subtract(start, tree.mean(trajectory.end)), trajectory
