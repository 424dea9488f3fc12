"""First-order MAML, in the form of the released Reptile code and in the form of Finn et al."""

from __future__ import annotations

from fomal.inner.loop import InnerLoop, Trajectory
from fomal.outer.rule import Expansion, OuterRule, query_expansion, step_expansion
from fomal.utils import tree
from fomal.utils.checks import positive
from fomal.utils.tree import Tree


class FOMAML(OuterRule):
    """The released code's FOMAML: the displacement of the last inner step alone (Nichol et al. 2018, section 6.2).

    Args:
        tail_shots: examples per class kept for the last mini-batch alone (separate tail); None lets it overlap the
            earlier ones (shared tail).
    """

    def __init__(self, tail_shots: int | None = None) -> None:
        if tail_shots is not None:
            positive(tail_shots=tail_shots)
        self.tail_shots = tail_shots

    def __call__(self, inner: InnerLoop, start: Tree) -> tuple[Tree, Trajectory]:
        """See `OuterRule`."""
        trajectory = inner.rollout(start, step_weights=_last(len(inner.indices)))
        return tree.scaled(inner.mean(trajectory.combination), -1.0), trajectory

    def expansion(self, inner_steps: int) -> Expansion:
        """Divided by alpha: AvgGrad - (k - 1) alpha AvgGradInner."""
        return step_expansion(_last(inner_steps))


class QueryFOMAML(OuterRule):
    """First-order MAML of Finn et al. 2017: the raw gradient of the query loss at the adapted parameters."""

    needs_query = True

    def __call__(self, inner: InnerLoop, start: Tree) -> tuple[Tree, Trajectory]:
        """See `OuterRule`."""
        trajectory = inner.rollout(start)
        return inner.mean(inner.query_gradients(trajectory.end)), trajectory

    def expansion(self, inner_steps: int) -> Expansion:
        """AvgGrad - k alpha AvgGradInner for k inner steps (section 5.1)."""
        return query_expansion(inner_steps, 0)


def _last(steps: int) -> list[float]:
    return [0.0] * (steps - 1) + [1.0]
