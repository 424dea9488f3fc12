"""Alignment of gradients within and between tasks: what AvgGradInner raises (Nichol et al. 2018, section 5.1)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from fomal.analysis.terms import Estimate
from fomal.inner.objective import Objective
from fomal.tasks.episode import Episode
from fomal.utils.tree import Tree, stack


class Alignment(NamedTuple):
    """Means over T tasks of inner products of gradients on disjoint mini-batches, at one initialisation.

    Attributes:
        within: <g_t1, g_t2> of two mini-batches of one task.
        between: <g_s1, g_t2> of different tasks.
        within_cosine: likewise of the gradients divided by their norms.
        between_cosine: likewise.
    """

    within: Estimate
    between: Estimate
    within_cosine: Estimate
    between_cosine: Estimate


def halves(episode: Episode) -> list[tuple[Tensor, Tensor]]:
    """Two disjoint mini-batches of each task, (T, B, ...): of every class, every other support and query example.

    Raises:
        ValueError: a class has fewer than two examples, or see `Episode.plain`.
    """
    episode.plain("gradient alignment")
    parts: list[list[tuple[Tensor, Tensor]]] = [[], []]
    for x, y in ((episode.support_x, episode.support_y), (episode.query_x, episode.query_y)):
        shots = x.shape[1] // episode.blocks  # both sets list their examples class by class
        place = torch.arange(episode.blocks * shots, device=x.device) % max(shots, 1)
        for half in (0, 1):
            # Of an odd number, the support's extra example goes to the first half and the query's to the second.
            chosen = (place + (x is episode.query_x) * (shots % 2)) % 2 == half
            parts[half].append((x[:, chosen], y[:, chosen]))
    batches = [tuple(torch.cat(sets, 1) for sets in zip(*half, strict=True)) for half in parts]
    if min(batch[0].shape[1] for batch in batches) < episode.blocks:
        raise ValueError(
            "alignment needs two examples of each class in a task: raise data.shots or data.query_shots to 1 or more."
        )
    return [(x, y) for x, y in batches]


def gradient_alignment(objective: Objective, start: Tree, episodes: Iterable[Episode]) -> Alignment:
    """Measure the alignment at an initialisation.

    Args:
        objective: losses and gradients of the network.
        start: the initialisation, not stacked.
        episodes: the tasks, at least 3, some at a time.
    """
    found: list[list[Tensor]] = [[], []]
    for episode in episodes:
        params = stack(start, episode.tasks)
        for half, (x, y) in zip(found, halves(episode), strict=True):
            gradients = objective.gradients(params, x, y)[0]
            parts = [g.detach()[:, None].flatten(1) for g in gradients.values()]  # (T, size), scalars too
            half.append(torch.cat(parts, 1).double())  # (T, d)
    first, second = (torch.cat(half) for half in found)
    products = first @ second.T  # (T, T)
    cosines = products / (first.norm(dim=1)[:, None] * second.norm(dim=1))
    return Alignment(_within(products), _between(products), _within(cosines), _between(cosines))


def _within(products: Tensor) -> Estimate:
    own = products.diagonal()
    return Estimate(float(own.mean()), float(1.96 * own.std() / len(own) ** 0.5))


def _between(products: Tensor) -> Estimate:
    """The mean over pairs of tasks; its interval by the jackknife, since the pairs share their tasks."""
    tasks = len(products)
    off = products - torch.diag(products.diagonal())

    def mean(total: Tensor, count: int) -> Tensor:
        return total / (count * (count - 1))

    without = mean(off.sum() - off.sum(0) - off.sum(1), tasks - 1)  # (T,), one task left out at a time
    error = ((tasks - 1) / tasks * (without - without.mean()).square().sum()).sqrt()
    return Estimate(float(mean(off.sum(), tasks)), float(1.96 * error))
