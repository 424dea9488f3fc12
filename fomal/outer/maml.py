"""MAML (Finn, Abbeel & Levine 2017), exact."""

from __future__ import annotations

import torch
from torch import Tensor

from fomal.inner.rollout import InnerLoop, Trajectory
from fomal.outer.rule import OuterRule
from fomal.tree import Tree


class MAML(OuterRule):
    """Outer gradient d/dphi mean_t L_query(W_t(phi)), differentiated through every inner step.

    Memory grows with the number of inner steps, since the whole inner loop stays in the graph.
    """

    needs_query = True
    differentiates = True

    def __call__(self, inner: InnerLoop, start: Tree) -> tuple[Tree, Trajectory]:
        """See `OuterRule`."""

        def query_loss(start: Tree) -> tuple[Tensor, Trajectory]:
            trajectory = inner.rollout(start)
            return inner.query_losses(trajectory.end).mean(), trajectory

        gradient, trajectory = torch.func.grad(query_loss, has_aux=True)(start)
        return gradient, trajectory
