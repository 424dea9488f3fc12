"""One meta-iteration of one process, and of all of them together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from fomal.engine.chunking import Chunks
from fomal.engine.functional import plain_attention
from fomal.inner.loop import InnerLoop
from fomal.inner.optimizer import SHARED, State
from fomal.outer.rule import OuterRule
from fomal.tasks.episode import Episode, Numbers
from fomal.utils import tree
from fomal.utils.fingerprint import settings
from fomal.utils.processes import processes, sum_over_processes
from fomal.utils.tree import Tree


class MetaGradient(NamedTuple):
    """The outer gradient of a meta-batch, with its losses and inner state.

    Attributes:
        gradient: the outer gradient, the mean over the tasks that count.
        state: the inner optimiser's state after the last step, the mean over the same tasks.
        losses: (2,), the mean loss on the first and on the last mini-batch.
        weight: (), the share of the tasks that count, times their mean weight, summed over processes; of several runs
            (R,), where tasks have weights.
        skipped: (), the number of tasks that do not.
        finite: (), bool: whether no value is infinite or NaN, where that is known already.
    """

    gradient: Tree
    state: State
    losses: Tensor
    weight: Tensor
    skipped: Tensor
    finite: Tensor | None = None

    def tensors(self) -> list[Tensor]:
        """The means over tasks: what may be non-finite, and what is reduced over processes."""
        moments = [t for part, values in self.state.items() if part != SHARED for t in values.values()]
        return [*self.gradient.values(), *moments, self.losses]

    def with_tensors(self, tensors: Sequence[Tensor]) -> MetaGradient:
        """The same with other values for `tensors`."""
        left = iter(tensors)
        gradient = {name: next(left) for name in self.gradient}
        state = {
            part: values if part == SHARED else {name: next(left) for name in values}
            for part, values in self.state.items()
        }
        return self._replace(gradient=gradient, state=state, losses=next(left), finite=None)

    def is_finite(self) -> Tensor:
        """(), bool: whether no value is infinite or NaN."""
        if self.finite is not None:
            return self.finite
        return torch.stack([t.isfinite().all() for t in self.tensors()]).all()


def meta_gradient(
    rule: OuterRule, inner: InnerLoop, start: Tree, skip: bool, chunks: Chunks | None = None
) -> MetaGradient:
    """Run a meta-batch.

    Args:
        rule: the outer rule.
        inner: the inner loops.
        start: the initialisation.
        skip: leave out tasks whose loss, gradient or state is not finite; the others are run again. Looking costs one
            wait for the device.
        chunks: runs the tasks in chunks of as many as memory allows; None: all at once. Between chunks their mean
            alone is kept. The result is the same up to rounding, and up to the draws of a network that has random
            operations.

    Raises:
        FloatingPointError: with `skip`, where all tasks are finite and their mean is not.
        torch.OutOfMemoryError: see `Chunks.each`.
    """
    chunks = chunks or Chunks(inner.tasks)
    found = _mean_over_chunks(rule, inner, start, chunks)
    if not skip or found.is_finite():
        return found
    bad = bad_tasks(rule, inner, start)
    if not bad:
        raise FloatingPointError(
            "the outer gradient overflows, though that of each task is finite: lower the step sizes."
        )
    tasks = inner.tasks
    skipped = torch.full_like(found.skipped, len(bad))
    if len(bad) == tasks:
        nothing = found.with_tensors([torch.zeros_like(t) for t in found.tensors()])
        return nothing._replace(weight=torch.zeros_like(found.weight), skipped=skipped)
    index = torch.tensor([t for t in range(tasks) if t not in bad], device=inner.episode.number.device)
    good = _mean_over_chunks(rule, inner.select(index), start, chunks)
    return good._replace(weight=good.weight * (1 - len(bad) / tasks), skipped=skipped)


def gradient_in_series(rule: OuterRule, loops: Sequence[InnerLoop], start: Tree, skip: bool) -> MetaGradient:
    """Run a meta-batch task by task, the inner optimiser's state going through all of them, as the released code does.

    Args:
        rule: the outer rule.
        loops: the inner loops, which begin from one state.
        start: the initialisation.
        skip: see `meta_gradient`.

    Returns:
        As `meta_gradient`, with the state that the last task leaves.
    """
    state, tasks = loops[0].state, sum(inner.tasks for inner in loops)
    parts = []
    for inner in loops:
        for place in range(inner.tasks):
            one = replace(inner.select(slice(place, place + 1)), state=state)
            found = meta_gradient(rule, one, start, skip)
            parts.append((found, 1 / tasks))
            if not skip or found.weight:
                state = found.state
    return mean_over_parts(parts)._replace(state=state)


def varied(batch: Episode | Numbers, phi: Tree, state: State) -> tuple[Episode | Numbers, Tree, State]:
    """Other values of every tensor that a meta-gradient depends on."""
    if isinstance(batch, Episode):
        batch = batch.map(lambda t: 0.9 * t if t.is_floating_point() else t)
    batch = batch._replace(number=batch.number + 1000)
    state = {
        part: {name: t + 3 if part == SHARED else 0.9 * t + 0.01 for name, t in values.items()}
        for part, values in state.items()
    }
    return batch, {name: 0.9 * p + 0.01 for name, p in phi.items()}, state


def bad_tasks(rule: OuterRule, inner: InnerLoop, start: Tree) -> list[int]:
    """The places of the tasks whose loss, outer gradient or inner state is not finite, found by running each alone."""
    return [t for t in range(inner.tasks) if not _run(rule, inner.select(slice(t, t + 1)), start).is_finite()]


def mean_over_processes(found: MetaGradient, flags: Tensor) -> tuple[MetaGradient, Tensor]:
    """The mean over all tasks of all processes, in one all-reduce.

    Args:
        found: what this process's tasks say.
        flags: (n,) numbers to be added over processes on the same way.

    Returns:
        The mean, with `weight` and `skipped` summed, and the sums of `flags`.
    """
    if processes() == 1:
        return found, flags
    weighted = [t * tree.beside(found.weight, t) for t in found.tensors()]
    *sums, weight, skipped, flags = sum_over_processes([*weighted, found.weight, found.skipped, flags])
    means = [_divided(t, weight) for t in sums]
    return found.with_tensors(means)._replace(weight=weight, skipped=skipped), flags


def mean_over_parts(parts: Iterable[tuple[MetaGradient, float]]) -> MetaGradient:
    """The mean over all tasks of what parts of them say, of which one alone is kept at a time.

    Args:
        parts: what the tasks of each say, and their share of all tasks.
    """
    total: MetaGradient | None = None
    for found, share in parts:
        if share == 1:
            return found
        weight = found.weight.double() * share
        more = found.with_tensors([t * tree.beside(weight, t) for t in found.tensors()])._replace(weight=weight)
        if total is None:  # counters are the same in all parts
            total = more
            continue
        sums = [a + b for a, b in zip(total.tensors(), more.tensors(), strict=True)]
        total = total.with_tensors(sums)._replace(weight=total.weight + weight, skipped=total.skipped + found.skipped)
    assert total is not None  # there is a task
    mean = total.with_tensors([_divided(t, total.weight) for t in total.tensors()])
    return mean._replace(weight=total.weight.to(found.weight.dtype))


def _divided(t: Tensor, weight: Tensor) -> Tensor:
    """A sum over tasks by the sum of their weights; 0 where nothing counts."""
    return t / tree.beside(weight, t).clamp_min(torch.finfo(t.dtype).tiny)


def _mean_over_chunks(rule: OuterRule, inner: InnerLoop, start: Tree, chunks: Chunks) -> MetaGradient:
    return mean_over_parts(chunks.each("training", inner, lambda part: _run(rule, part, start)))


def _run(rule: OuterRule, inner: InnerLoop, start: Tree) -> MetaGradient:
    if rule.differentiates:
        with plain_attention():
            gradient, trajectory = inner.traced(settings(rule), rule, start)
    else:
        gradient, trajectory = rule(inner, start)
    losses = trajectory.losses if inner.indices else inner.query_losses(trajectory.end).detach()[None]
    ends = losses[0], losses[-1]  # [[0, -1]] would wait for the device
    return MetaGradient(
        tree.detach(gradient),
        inner.mean_state(trajectory.state),
        inner.task_mean(torch.stack(ends, 1)),
        inner.weight.to(losses.dtype),
        skipped=torch.zeros((), device=ends[0].device),
    )
