"""The inner loop: k optimiser steps on every task of a meta-batch at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fomal import tree
from fomal.data.episode import Episode
from fomal.data.sampler import Plan
from fomal.inner.objective import Objective
from fomal.inner.optimizer import InnerOptimizer, State, stack_state
from fomal.tree import Tree


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
    """What an inner loop leaves; only what the outer rule asked for is kept, so memory does not grow with k.

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


def take(x: Tensor, index: Tensor) -> Tensor:
    """Examples `index` (T, B) of each task of x (T, S, ...): (T, B, ...)."""
    return x[torch.arange(len(x), device=x.device)[:, None], index]


@dataclass(frozen=True)
class InnerLoop:
    """The inner loops of one meta-batch, ready to run from any initialisation.

    Attributes:
        objective: losses and gradients of the network.
        optimizer: the inner optimiser.
        state: its state before the first step, of one task.
        plan: the mini-batch of each step.
        episode: the tasks.
        adapted: names of the parameters that are adapted; None: all. The others stay as in the initialisation.
    """

    objective: Objective
    optimizer: InnerOptimizer
    state: State
    plan: Plan
    episode: Episode
    adapted: frozenset[str] | None = None

    def split(self, start: Tree) -> tuple[Tree, Tree]:
        """The parameters that are adapted, and the others."""
        if self.adapted is None:
            return start, {}
        adapted = {name: p for name, p in start.items() if name in self.adapted}
        return adapted, {name: p for name, p in start.items() if name not in self.adapted}

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The mini-batch of each step: x (T, B, *input) and y (T, B, ...)."""
        for index in self.plan:
            yield take(self.episode.support_x, index), take(self.episode.support_y, index)

    def steps(self, start: Tree, onward: Trajectory | None = None) -> Iterator[Step]:
        """Adapt every task from the initialisation `start` (one set of parameters), step by step.

        Args:
            start: the initialisation, not stacked.
            onward: a trajectory of the same tasks from the same initialisation, to go on from its end.
        """
        episode, tasks = self.episode, self.episode.tasks
        optimizer = self.optimizer.for_tasks(episode.seed, episode.split, episode.number)
        alone, common = self.split(start)
        everywhere = tree.stack(common, tasks)
        params, state = tree.stack(alone, tasks), stack_state(self.state, tasks)
        if onward is not None:
            params, state = self.split(onward.end)[0], onward.state
        for x, y in self.batches():
            if optimizer is self.optimizer:
                moved, state, loss = self.objective.step(optimizer, params, state, x, y, common)
            else:  # of these episodes alone, so that its update is not the same in each step
                gradient, loss = self.objective.gradients(params, x, y, common)
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
        end, state = tree.stack(start, tasks), stack_state(self.state, tasks)
        combination: Tree = {}
        losses = [self.episode.support_x.new_empty(0, tasks)] if onward is None else [onward.losses]
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
        return Trajectory(end, state, torch.cat(losses), combination)

    def query_gradients(self, params: Tree) -> Tree:
        """Each task's gradient of the query loss at its own stacked parameters."""
        return self.objective.gradients(params, self.episode.query_x, self.episode.query_y)[0]

    def query_losses(self, params: Tree) -> Tensor:
        """Each task's query loss, (T,), at its own stacked parameters."""
        return self.objective.losses(params, self.episode.query_x, self.episode.query_y)
