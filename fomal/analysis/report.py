"""All figures of the analysis of one model on one distribution of tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fomal.analysis.problem import Problem
from fomal.analysis.taylor import geometric, leading_terms, norm, residuals, slope
from fomal.analysis.terms import Terms, estimate_terms
from fomal.inner import SGD
from fomal.inner.objective import Objective
from fomal.outer import FOMAML, MAML, BinomialMAML, OuterRule, QueryFOMAML, Reptile, TruncatedMAML
from fomal.tasks.episode import Episode
from fomal.utils.checks import MANY, nonnegative, positive
from fomal.utils.tree import Tree

Watch = Callable[[Sequence[Tensor], str], Iterable[Tensor]]

GROUPS = 20  # of tasks, for the jackknife
TAYLOR_TASKS = 5  # the expansion holds for each task alone, so a few show it
DECADES = 2


@dataclass(frozen=True)
class Report:
    """The findings of `analyze`.

    Attributes:
        terms: AvgGrad, AvgGradInner and the rules' coefficients at the inner step size asked for.
        limit: the same at a step size so small that higher orders hardly matter.
        alphas: inner step sizes of the Taylor residuals.
        residuals: of each rule, one for each of `alphas`.
        slopes: the exponent of each rule's residuals as a power of alpha; 2 in theory.
    """

    terms: Terms
    limit: Terms
    alphas: list[float]
    residuals: dict[str, list[float]]
    slopes: dict[str, float]


def standard_rules() -> dict[str, OuterRule]:
    """The rules that every analysis compares."""
    rules = [Reptile(), FOMAML(), QueryFOMAML(), MAML()]
    orders = {f"{type(rule).__name__}(order=1)": rule for rule in (TruncatedMAML(1), BinomialMAML(1))}
    return {type(rule).__name__: rule for rule in rules} | orders


def check_sizes(tasks: int, batches: int, lr: float) -> None:
    """Raise ValueError for numbers with which nothing can be analysed; see `analyze`."""
    positive(MANY, tasks=tasks, batches=batches)
    if tasks < 3:
        raise ValueError(f"tasks={tasks} must be at least 3: the intervals come from the differences between tasks.")
    if batches < 2:
        raise ValueError(f"batches={batches} must be at least 2: AvgGradInner takes two mini-batches of a task.")
    nonnegative(lr=lr)
    if lr == 0:
        raise ValueError(f"lr={lr} must be above 0.")


def analyze(
    objective: Objective,
    start: Tree,
    episodes: Callable[[Tensor], Episode],
    rules: dict[str, OuterRule],
    tasks: int,
    batches: int,
    batch_size: int,
    lr: float,
    watch: Watch = lambda groups, what: groups,
) -> Report:
    """Measure AvgGrad, AvgGradInner, the rules' coefficients and their Taylor residuals, in float64.

    Args:
        objective: losses and gradients of the network, whose dtype is float64.
        start: the initialisation, not stacked, float64.
        episodes: the tasks of the numbers (T,), on the device of `start`.
        rules: rules by name.
        tasks: how many tasks to average over.
        batches: mini-batches per task, n >= 2; inner steps of a rule with a query set are one less.
        batch_size: examples in a mini-batch.
        lr: inner step size alpha, > 0.
        watch: shows the progress through a sequence of groups of tasks, of which it is told what they are for.

    Raises:
        ValueError: too few tasks or mini-batches, a rule that does not fit their number, or two losses.
    """
    check_sizes(tasks, batches, lr)
    if objective.query_loss is not None:
        raise ValueError(
            f"query_loss={type(objective.query_loss).__name__}: the expansion is of one loss on all mini-batches: "
            f"leave model.query_loss out, as null."
        )
    for rule in rules.values():
        rule.check(batches - rule.needs_query, SGD(lr))

    def problem(number: Tensor) -> Problem:
        return Problem.sample(objective, start, episodes(number), batches, batch_size)

    few = problem(torch.arange(min(TAYLOR_TASKS, tasks)))
    first_x, first_y = few.episode.support_x[:2, :batch_size], few.episode.support_y[:2, :batch_size]
    objective.settle(start, first_x, first_y, second_order=True)
    high = _largest_alpha(few)
    alphas = geometric(high / 10**DECADES, high, 4 * DECADES + 1)
    left = {name: residuals(few, rule, alphas) for name, rule in rules.items()}
    groups = torch.arange(tasks).tensor_split(min(GROUPS, tasks))
    estimates = [
        estimate_terms(map(problem, watch(groups, f"coefficients at α = {alpha:.1e}")), rules, alpha)
        for alpha in (lr, alphas[0])
    ]
    return Report(estimates[0], estimates[1], alphas, left, {name: slope(alphas, r) for name, r in left.items()})


def _largest_alpha(problem: Problem) -> float:
    """The inner step size at which the first order of MAML's gradient is 3 % of its zeroth."""
    expansion = MAML().expansion(len(problem.indices) - 1)
    zeroth, first = leading_terms(problem, expansion)
    return 0.03 * norm(zeroth) / norm(first)
