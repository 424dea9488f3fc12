"""The Taylor expansion of outer gradients in the inner step size, and what is left of them beyond it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from fomal.analysis.problem import Problem
from fomal.outer.rule import Expansion, OuterRule
from fomal.utils import tree
from fomal.utils.tree import Tree


def leading_terms(problem: Problem, expansion: Expansion) -> tuple[Tree, Tree]:
    """Zeroth and first order of an outer gradient in the inner step size, for the very mini-batches of `problem`.

    The outer gradient is zeroth - alpha first + O(alpha^2), means over the tasks (Nichol et al. 2018, section 5.1).
    """
    gradients = problem.gradients()  # (n, T, ...)
    like = next(iter(gradients.values()))
    weights = torch.tensor(expansion.gradients, dtype=like.dtype, device=like.device)  # (n,)
    rows = torch.tensor(expansion.products, dtype=like.dtype, device=like.device)  # (n, n)
    zeroth = {name: torch.tensordot(weights, g, 1).mean(0) for name, g in gradients.items()}
    vectors = {name: torch.tensordot(rows, g, 1) for name, g in gradients.items()}  # of i: sum_j rows[i][j] g_j
    first = {name: v.sum(0).mean(0) for name, v in problem.hessian_products(vectors).items()}
    return zeroth, first


def residuals(problem: Problem, rule: OuterRule, alphas: Sequence[float]) -> list[float]:
    """||outer gradient - leading terms|| for each inner step size.

    Raises:
        ValueError: the rule's leading terms are not known.
    """
    expansion = rule.expansion(len(problem.indices) - rule.needs_query)
    if expansion is None:
        raise ValueError(f"{type(rule).__name__} has no expansion: define its method `expansion` to compare with.")
    zeroth, first = leading_terms(problem, expansion)
    return [
        norm(tree.subtract(problem.outer_gradient(rule, alpha), tree.add_scaled(zeroth, first, -alpha)))
        for alpha in alphas
    ]


def slope(alphas: Sequence[float], values: Sequence[float]) -> float:
    """The exponent p of the power law values ~ alphas^p, by least squares on the logarithms."""
    x = torch.tensor(alphas, dtype=torch.float64).log()
    y = torch.tensor(values, dtype=torch.float64).log()
    x = x - x.mean()
    return float((x * y).sum() / x.square().sum())


def geometric(low: float, high: float, count: int) -> list[float]:
    """`count` values from `low` to `high` in equal ratios."""
    return torch.logspace(math.log10(low), math.log10(high), count, dtype=torch.float64).tolist()


def norm(values: Tree) -> float:
    """Euclidean norm of all values together."""
    return float(torch.stack([v.norm() for v in values.values()]).norm())
