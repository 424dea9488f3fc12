"""The inner loop: k optimiser steps on every task of a meta-batch at once."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fomal.inner.objective import Objective
from fomal.inner.optimizer import SHARED, InnerOptimizer, State
from fomal.tasks.episode import FIELDS, Episode
from fomal.tasks.sampler import MinibatchIndices
from fomal.utils import tree
from fomal.utils.fingerprint import settings
from fomal.utils.pytree import Data, map_leaves, named
from fomal.utils.tree import Tree


class Step(NamedTuple):
    """One step of all tasks.

    Attributes:
        before: stacked parameters before the step.
        after: stacked parameters after it.
        state: the inner optimiser's stacked state after it.
        loss: (T,), each task's loss on the step's mini-batch at `before`.
    """

    before: Tree
    after: Tree
    state: State
    loss: Tensor


class Trajectory(NamedTuple):
    """The record that an inner loop leaves; only what the outer rule asked for is kept, so memory does not grow with k.

    Attributes:
        end: stacked parameters after the last step, (T, ...) each.
        state: the inner optimiser's stacked state after the last step.
        losses: (k, T), the loss on each step's mini-batch before the step.
        combination: stacked sum_j w_j d_j of the steps' displacements d_j, of the parameters that are adapted; empty
            where no weights were given.
    """

    end: Tree
    state: State
    losses: Tensor
    combination: Tree


def gather_examples(x: Data, index: Tensor) -> Data:
    """Examples `index` (T, B) of each task of x (T, S, ...): (T, B, ...)."""
    rows = torch.arange(len(index), device=index.device)[:, None]
    return map_leaves(lambda t: t[rows, index], x)


@dataclass(frozen=True)
class InnerLoop:
    """The inner loops of one meta-batch, ready to run from any initialisation.

    Attributes:
        objective: losses and gradients of the network.
        optimizer: the inner optimiser.
        state: its state before the first step, of one task.
        indices: the mini-batch of each step.
        episode: the tasks.
        adapted: names of the parameters that are adapted; None: all. The others stay as in the initialisation.
    """

    objective: Objective
    optimizer: InnerOptimizer
    state: State
    indices: MinibatchIndices
    episode: Episode
    adapted: frozenset[str] | None = None

    @property
    def tasks(self) -> int:
        """The number of initialisations that are taken from one, and averaged."""
        return self.episode.tasks

    @property
    def device(self) -> torch.device:
        """Where the tasks are."""
        return self.episode.device

    @property
    def signature(self) -> Hashable:
        """All that the memory of a task depends on: shapes of its examples, and the number of steps."""
        sets = {"support": self.episode.support_x, "query": self.episode.query_x}
        return (*((name, t.shape[1:]) for name, t in named(sets, "")), len(self.indices))

    def sample(self, steps: int | None) -> InnerLoop:
        """The first task's inner loop, not traced; with `steps`, so many of its steps."""
        one = self.select(slice(0, 1))
        return replace(one, indices=one.indices[:steps], objective=one.objective.eager())

    def select(self, tasks: Tensor | slice) -> InnerLoop:
        """The inner loops of the tasks of the given places alone."""
        return replace(self, episode=self.episode.select(tasks), indices=tuple(step[tasks] for step in self.indices))

    def expand_to_tasks(self, start: Tree) -> Tree:
        """One copy of an initialisation, or of a part of the state, for each task: (T, ...) each."""
        return tree.stack(start, self.tasks)

    def mean(self, stacked: Tree) -> Tree:
        """The mean over the tasks."""
        return {name: self.task_mean(t) for name, t in stacked.items()}

    def task_mean(self, t: Tensor) -> Tensor:
        """The mean over the tasks, the first axis of t, each with its weight."""
        if self.episode.weight is None:
            return t.mean(0)
        weight = self.episode.weight.to(t.dtype)  # (T,)
        whole = self.task_sum(weight).clamp_min(torch.finfo(t.dtype).tiny)
        total = self.task_sum(t * tree.beside(weight, t))
        return total / tree.beside(whole, total)

    @property
    def weight(self) -> Tensor:
        """The mean weight of the tasks, (); 1 where they have none."""
        weight = self.episode.weight
        return torch.ones((), device=self.device) if weight is None else self.task_sum(weight) / self.tasks

    def task_sum(self, t: Tensor) -> Tensor:
        """The sum over the tasks, the first axis of t."""
        return t.sum(0)

    def expand_state_to_tasks(self) -> State:
        """The state before the first step, for each task."""
        return {part: values if part == SHARED else self.expand_to_tasks(values) for part, values in self.state.items()}

    def mean_state(self, state: State) -> State:
        """The mean over the tasks of a stacked state: how carried state leaves a meta-batch."""
        return {part: values if part == SHARED else self.mean(values) for part, values in state.items()}

    def split(self, start: Tree) -> tuple[Tree, Tree]:
        """The parameters that are adapted, and the others."""
        if self.adapted is None:
            return start, {}
        adapted = {name: p for name, p in start.items() if name in self.adapted}
        return adapted, {name: p for name, p in start.items() if name not in self.adapted}

    def batches(self) -> Iterator[tuple[Data, Data]]:
        """The mini-batch of each step: x (T, B, *input) and y (T, B, ...)."""
        for index in self.indices:
            yield gather_examples(self.episode.support_x, index), gather_examples(self.episode.support_y, index)

    def steps(self, start: Tree, onward: Trajectory | None = None) -> Iterator[Step]:
        """Adapt every task from the initialisation `start` (one set of parameters), step by step.

        Args:
            start: the initialisation, not stacked by task.
            onward: a trajectory of the same tasks from the same initialisation, to go on from its end.
        """
        episode = self.episode
        optimizer = self.optimizer.for_tasks(episode.seed, episode.split, episode.number)
        adapted, frozen = self.split(start)
        everywhere = self.expand_to_tasks(frozen)
        params, state = self.expand_to_tasks(adapted), self.expand_state_to_tasks()
        if onward is not None:
            params, state = self.split(onward.end)[0], onward.state
        for x, y in self.batches():
            if optimizer is self.optimizer:
                moved, state, loss = self.objective.step(optimizer, params, state, x, y, frozen)
            else:  # of these episodes alone, so that its update is not the same in each step
                gradient, loss = self.objective.gradients(params, x, y, frozen)
                moved, state = optimizer.update(gradient, state, params)
            yield Step({**everywhere, **params}, {**everywhere, **moved}, state, loss)
            params = moved

    def rollout(
        self, start: Tree, step_weights: Sequence[float] | None = None, onward: Trajectory | None = None
    ) -> Trajectory:
        """Adapt every task from the initialisation `start` (one set of parameters).

        Args:
            start: the initialisation, not stacked. If it requires gradients, or is differentiated with
                `torch.func`, the result is a differentiable function of it.
            step_weights: weights w_j of the steps' displacements d_j = W_j - W_(j-1), one for each step.
            onward: a trajectory of the same tasks from the same initialisation, to go on from its end.
        """
        tasks = self.episode.tasks
        end, state = self.expand_to_tasks(start), self.expand_state_to_tasks()
        combination: Tree = {}
        losses: list[Tensor] = [] if onward is None else [onward.losses]
        if onward is not None:
            end, state = onward.end, onward.state
        for number, step in enumerate(self.steps(start, onward)):
            end, state = step.after, step.state
            losses.append(step.loss[None])
            weight = step_weights[number] if step_weights is not None else 0.0
            if weight:
                after, before = self.split(step.after)[0], self.split(step.before)[0]
                displacement = tree.scaled(tree.subtract(after, before), weight)
                combination = tree.add(combination, displacement) if combination else displacement
        if not losses:  # no step
            losses = [next(iter(end.values())).new_empty(0, tasks)]
        return Trajectory(end, state, torch.cat(losses), combination)

    def traced(
        self, name: Any, run: Callable[[InnerLoop, Tree], tuple[Tree, Trajectory]], start: Tree
    ) -> tuple[Tree, Trajectory]:
        """`run(self, start)`, traced as one function where the objective traces.

        Args:
            name: tells what `run` does, with all that it depends on beside its arguments.
            run: from inner loops and an initialisation to a gradient and the trajectory.
            start: the initialisation.
        """
        if self.optimizer.for_tasks(self.episode.seed, self.episode.split, self.episode.number) is not self.optimizer:
            return run(self, start)  # with noise of these episodes

        fields = [name for name in (*FIELDS, "weight") if getattr(self.episode, name) is not None]

        def function(start: Tree, state: State, indices: tuple[Tensor, ...], *episode: Data) -> tuple[Any, ...]:
            tasks = self.episode._replace(**dict(zip(fields, episode, strict=True)))
            inner = replace(self, objective=self.objective.eager(), state=state, indices=indices, episode=tasks)
            gradient, trajectory = run(inner, start)
            return gradient, *trajectory

        losses = self.objective.losses_used()
        settled = (name, settings(self.optimizer), losses, self.signature, self.adapted, self.episode.ways)
        tensors = (getattr(self.episode, name) for name in fields)
        gradient, *parts = self.objective.run(settled, function, start, self.state, self.indices, *tensors)
        return gradient, Trajectory(*parts)

    def query_gradients(self, params: Tree) -> Tree:
        """Each task's gradient of the query loss at its own stacked parameters."""
        x, y = self.episode.query_x, self.episode.query_y
        return self.objective.for_queries().gradients(params, x, y, support=self.support_for_queries())[0]

    def query_losses(self, params: Tree) -> Tensor:
        """Each task's query loss, (T,), at its own stacked parameters."""
        x, y = self.episode.query_x, self.episode.query_y
        return self.objective.for_queries().losses(params, x, y, self.support_for_queries())

    def support_for_queries(self) -> Data | None:
        """See `Objective.support_for`."""
        return self.objective.support_for(self.episode.support_x, self.episode.query_x)
