"""Weighted combinations of the inner steps (Nichol et al. 2018, section 6.1)."""

from __future__ import annotations

from collections.abc import Sequence

from fomal.inner.loop import InnerLoop, Trajectory
from fomal.inner.optimizer import InnerOptimizer
from fomal.outer.rule import Expansion, OuterRule, step_expansion
from fomal.utils import tree
from fomal.utils.checks import numbers, positive
from fomal.utils.tree import Tree


class StepCombination(OuterRule):
    """Outer gradient -mean_t sum_j w_j d_j, with d_j the displacement of inner step j.

    All ones is Reptile; zeros and a last one is the released FOMAML; under inner SGD, d_j = -lr g_j.

    Args:
        weights: w_1 .. w_k, one for each inner step.
        tail_shots: examples per class kept for the last mini-batch alone; None: it is cut like the others.
    """

    def __init__(self, weights: Sequence[float], tail_shots: int | None = None) -> None:
        numbers(weights=weights)
        if tail_shots is not None:
            positive(tail_shots=tail_shots)
        if not any(weights):
            raise ValueError(f"weights={list(weights)} are all zero: at least one inner step must count.")
        self.weights = list(weights)
        self.tail_shots = tail_shots

    def check(self, inner_steps: int, optimizer: InnerOptimizer) -> None:
        """Also refuse a number of weights other than `inner_steps`."""
        super().check(inner_steps, optimizer)
        if len(self.weights) != inner_steps:
            raise ValueError(
                f"weights has {len(self.weights)} entries, but model.train.steps={inner_steps}: give one for each "
                f"step, or change it."
            )

    def expansion(self, inner_steps: int) -> Expansion:
        """Divided by alpha: sum_j w_j AvgGrad - sum_j (j - 1) w_j alpha AvgGradInner."""
        return step_expansion(self.weights)

    def __call__(self, inner: InnerLoop, start: Tree) -> tuple[Tree, Trajectory]:
        """See `OuterRule`."""
        trajectory = inner.rollout(start, step_weights=self.weights)
        return tree.scaled(inner.mean(trajectory.combination), -1.0), trajectory
