"""AvgGrad and AvgGradInner of a model on its tasks, and how much of either is in the outer gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from fomal.analysis.problem import Problem
from fomal.outer.rule import OuterRule
from fomal.utils.tree import Tree


class Estimate(NamedTuple):
    """A figure and the half-width of its 95 % interval, by the jackknife over groups of tasks."""

    value: float
    ci95: float


class Coefficients(NamedTuple):
    """The shares of AvgGrad and of -alpha AvgGradInner in an outer gradient.

    Attributes:
        avg_grad: coefficient of AvgGrad, fitted.
        avg_grad_inner: coefficient of -alpha AvgGradInner, fitted.
        avg_grad_theory: what the expansion says; None where the rule has none.
        avg_grad_inner_theory: likewise.
        unexplained: share of the outer gradient's norm beyond both terms.
    """

    avg_grad: Estimate
    avg_grad_inner: Estimate
    avg_grad_theory: float | None
    avg_grad_inner_theory: float | None
    unexplained: Estimate


class Terms(NamedTuple):
    """The two terms on a distribution of tasks.

    Attributes:
        avg_grad: ||AvgGrad||, AvgGrad = E[g_1].
        avg_grad_inner: ||AvgGradInner||, AvgGradInner = E[H_2 g_1].
        cosine: of the angle between the two.
        rules: coefficients of each rule.
        tasks: number of tasks.
        batches: mini-batches per task, n; a rule with a query set takes the last of them for it.
        lr: inner step size alpha.
    """

    avg_grad: Estimate
    avg_grad_inner: Estimate
    cosine: Estimate
    rules: dict[str, Coefficients]
    tasks: int
    batches: int
    lr: float


def estimate_terms(problems: Iterable[Problem], rules: Mapping[str, OuterRule], lr: float) -> Terms:
    """Estimate both terms, and the coefficients they have in each rule's outer gradient under inner SGD.

    A rule's mean outer gradient is fitted, by least squares over all parameters, as
    a AvgGrad - b alpha AvgGradInner. Squared norms are estimated without the bias that noise gives them.

    Args:
        problems: groups of tasks of about equal size, at least 3; the interval comes from leaving one out at a time.
        rules: rules by name.
        lr: inner step size alpha.

    Raises:
        ValueError: fewer than 3 groups.
    """
    rows: dict[str, list[Tensor]] = {"AvgGrad": [], "AvgGradInner": [], **{name: [] for name in rules}}
    tasks = batches = 0
    for problem in problems:
        tasks, batches = tasks + problem.episode.tasks, len(problem.indices)
        avg_grad, avg_grad_inner = _both_terms(problem)
        rows["AvgGrad"].append(avg_grad)
        rows["AvgGradInner"].append(avg_grad_inner)
        for name, rule in rules.items():
            rows[name].append(_outer_gradient(problem, rule, lr))
    groups = len(rows["AvgGrad"])
    if groups < 3:
        raise ValueError(f"tasks: {groups} groups of them are too few for an interval: use more tasks.")
    # All that follows needs inner products alone: of each quantity in each group with each other one.
    vectors = torch.stack([v for name in rows for v in rows[name]])  # (quantities * G, d)
    gram = (vectors @ vectors.T).view(len(rows), groups, len(rows), groups)

    def jackknife(figure: Callable[[Tensor], Tensor]) -> Estimate:
        return _jackknife(figure, gram)

    return Terms(
        avg_grad=jackknife(lambda g: _inner(g, 0, 0).clamp_min(0).sqrt()),
        avg_grad_inner=jackknife(lambda g: _inner(g, 1, 1).clamp_min(0).sqrt()),
        cosine=jackknife(lambda g: _inner(g, 0, 1) / (_inner(g, 0, 0) * _inner(g, 1, 1)).clamp_min(0).sqrt()),
        rules={name: _coefficients(rule, i, lr, batches, jackknife) for i, (name, rule) in enumerate(rules.items(), 2)},
        tasks=tasks,
        batches=batches,
        lr=lr,
    )


def flat(values: Tree) -> Tensor:
    """All values in one vector, (d,)."""
    return torch.cat([v.reshape(-1) for v in values.values()])


def _both_terms(problem: Problem) -> tuple[Tensor, Tensor]:
    """AvgGrad and AvgGradInner, (d,) each, over the tasks of one group and all (pairs of) their mini-batches."""
    gradients, n = problem.gradients(), len(problem.indices)  # (n, T, ...)
    others = {name: g.sum(0, keepdim=True) - g for name, g in gradients.items()}
    products = problem.hessian_products(others)  # of i: H_i sum_(j != i) g_j
    avg_grad_inner = {name: p.sum(0).mean(0) / (n * (n - 1)) for name, p in products.items()}
    return flat({name: g.mean((0, 1)) for name, g in gradients.items()}), flat(avg_grad_inner)


def _outer_gradient(problem: Problem, rule: OuterRule, lr: float) -> Tensor:
    """The outer gradient, (d,), averaged over the rotations of the mini-batches.

    They are exchangeable, so this changes no expectation; but it takes out the noise of which one comes last.
    """
    n = len(problem.indices)
    turned = (replace(problem, indices=problem.indices[i:] + problem.indices[:i]) for i in range(n))
    return torch.stack([flat(p.outer_gradient(rule, lr)) for p in turned]).mean(0)


def _coefficients(
    rule: OuterRule, place: int, lr: float, batches: int, jackknife: Callable[[Callable[[Tensor], Tensor]], Estimate]
) -> Coefficients:
    def fit(gram: Tensor) -> tuple[Tensor, Tensor]:
        """Both coefficients, and the share of the norm that is left."""
        means = gram.mean((1, 3))  # inner products of the means over groups
        target = means[:2, place]
        solution = torch.linalg.solve(means[:2, :2], target)
        left = (means[place, place] - solution @ target).clamp_min(0)
        return solution * torch.tensor([1, -1 / lr], dtype=gram.dtype), (left / means[place, place]).sqrt()

    expansion = rule.expansion(batches - rule.needs_query)
    return Coefficients(
        avg_grad=jackknife(lambda gram: fit(gram)[0][0]),
        avg_grad_inner=jackknife(lambda gram: fit(gram)[0][1]),
        avg_grad_theory=expansion.avg_grad if expansion else None,
        avg_grad_inner_theory=expansion.avg_grad_inner if expansion else None,
        unexplained=jackknife(lambda gram: fit(gram)[1]),
    )


def _inner(gram: Tensor, a: int, b: int) -> Tensor:
    """The inner product of two expectations: between different groups alone, whose noise is independent."""
    between = gram[a, :, b]  # (G, G)
    groups = len(between)
    return (between.sum() - between.diagonal().sum()) / (groups * (groups - 1))


def _jackknife(figure: Callable[[Tensor], Tensor], gram: Tensor) -> Estimate:
    """A function of the groups' inner products, and 1.96 times its standard error from leaving out one at a time."""
    groups = gram.shape[1]
    without = []
    for left_out in range(groups):
        kept = torch.tensor([g for g in range(groups) if g != left_out], device=gram.device)
        without.append(figure(gram[:, kept][:, :, :, kept]))
    values = torch.stack(without)
    error = ((groups - 1) / groups * (values - values.mean()).square().sum()).sqrt()
    return Estimate(float(figure(gram)), float(1.96 * error))
