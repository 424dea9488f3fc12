"""The inner loops of several runs as one: more tasks, of which each has its own run's initialisation."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from fomal.inner.loop import InnerLoop
from fomal.inner.optimizer import SHARED, InnerOptimizer, State
from fomal.tasks.episode import Episode
from fomal.utils.tree import Tree

PerTask = Callable[[int, torch.device], InnerOptimizer]
"""The inner optimiser of so many tasks of each run, on a device."""


def optimizer_of_all(optimizers: Sequence[InnerOptimizer]) -> PerTask:
    """The inner optimiser of runs whose step sizes may differ: then it has one for each task.

    Args:
        optimizers: of each run, the same but for their step sizes.
    """
    first, rates = optimizers[0], [float(optimizer.lr) for optimizer in optimizers]
    if len(set(rates)) == 1:
        return lambda tasks, device: first

    @cache  # the same object each time, so that what is traced with it is found again
    def per_task(tasks: int, device: torch.device) -> InnerOptimizer:
        optimizer = copy(first)
        optimizer.lr = torch.tensor(rates, dtype=torch.float64, device=device).repeat_interleave(tasks)
        return optimizer

    return per_task


@dataclass(frozen=True, kw_only=True)
class SideBySide(InnerLoop):
    """The inner loops of R runs: the first T / R of the T tasks are those of the first run, and so on.

    Initialisations, the state before the first step, and means over tasks have R in front.

    Attributes:
        runs: their number R.
        per_task: makes the inner optimiser of as many tasks as there are.
    """

    runs: int
    per_task: PerTask

    @classmethod
    def join(cls, loops: Sequence[InnerLoop], per_task: PerTask) -> SideBySide:
        """The inner loops of runs with the same settings and equally many tasks.

        Args:
            loops: of each run.
            per_task: see `SideBySide`.
        """
        first = loops[0]
        return cls(
            first.objective,
            per_task(first.tasks, first.device),
            _stacked([loop.state for loop in loops]),
            tuple(torch.cat(step) for step in zip(*(loop.indices for loop in loops), strict=True)),
            Episode.join([loop.episode for loop in loops]),
            first.adapted,
            runs=len(loops),
            per_task=per_task,
        )

    @property
    def tasks(self) -> int:
        """The number of tasks of each run."""
        return self.episode.tasks // self.runs

    @property
    def signature(self) -> Hashable:
        """As `InnerLoop.signature`."""
        return self.runs, super().signature

    def select(self, tasks: Tensor | slice) -> SideBySide:
        """The inner loops of the tasks of the given places alone, of each run."""

        def chosen(t: Tensor) -> Tensor:
            return t.view(self.runs, len(t) // self.runs, *t.shape[1:])[:, tasks].flatten(0, 1)

        episode = self.episode.map(chosen)
        optimizer = self.per_task(episode.tasks // self.runs, self.device)
        return replace(self, episode=episode, indices=tuple(chosen(step) for step in self.indices), optimizer=optimizer)

    def expand_to_tasks(self, start: Tree) -> Tree:
        """Each run's initialisation, or a part of its state, for each of its tasks: from (R, ...) to (T, ...)."""
        each = {name: t[:, None].expand(-1, self.tasks, *t.shape[1:]) for name, t in start.items()}
        return {name: t.flatten(0, 1) for name, t in each.items()}

    def task_mean(self, t: Tensor) -> Tensor:
        """The mean of t (T, ...) over the tasks of each run, (R, ...), each with its weight."""
        return t.view(self.runs, -1, *t.shape[1:]).mean(1) if self.episode.weight is None else super().task_mean(t)

    def task_sum(self, t: Tensor) -> Tensor:
        """The sum of t (T, ...) over the tasks of each run, (R, ...)."""
        return t.view(self.runs, -1, *t.shape[1:]).sum(1)


def _stacked(states: Sequence[State]) -> State:
    """States of the same kind along a new first axis; counters, which are the same in all, as they are."""
    return {
        part: values
        if part == SHARED
        else {name: torch.stack([state[part][name] for state in states]) for name in values}
        for part, values in states[0].items()
    }


def of_run(state: State, place: int) -> State:
    """One run's state, of those that `SideBySide.join` has stacked."""
    return {
        part: values if part == SHARED else {name: t[place] for name, t in values.items()}
        for part, values in state.items()
    }
