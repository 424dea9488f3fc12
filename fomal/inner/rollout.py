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
        combination: stacked sum_j w_j d_j of the steps' displacements d_j; empty where no weights were given.
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
    """

    objective: Objective
    optimizer: InnerOptimizer
    state: State
    plan: Plan
    episode: Episode

    def steps(self, start: Tree) -> Iterator[Step]:
        """Adapt every task from the initialisation `start` (one set of parameters), step by step."""
        tasks = self.episode.tasks
        params, state = tree.stack(start, tasks), stack_state(self.state, tasks)
        for index in self.plan:
            x, y = take(self.episode.support_x, index), take(self.episode.support_y, index)  # (T, B, ...)
            gradient, loss = self.objective.gradients(params, x, y)
            moved, state = self.optimizer.update(gradient, state, params)
            yield Step(params, moved, state, loss)
            params = moved

    def rollout(self, start: Tree, step_weights: Sequence[float] | None = None) -> Trajectory:
        """Adapt every task from the initialisation `start` (one set of parameters).

        Args:
            start: the initialisation, not stacked. If it requires gradients, or is differentiated with
                `torch.func`, the result is a differentiable function of it.
            step_weights: weights w_j of the steps' displacements d_j = W_j - W_(j-1), one for each step.
        """
        combination: Tree = {}
        losses = []
        for number, step in enumerate(self.steps(start)):
            losses.append(step.loss)
            weight = step_weights[number] if step_weights is not None else 0.0
            if weight:
                displacement = tree.scaled(tree.subtract(step.after, step.before), weight)
                combination = tree.add(combination, displacement) if combination else displacement
        return Trajectory(step.after, step.state, torch.stack(losses), combination)

    def query_gradients(self, params: Tree) -> Tree:
        """Each task's gradient of the query loss at its own stacked parameters."""
        return self.objective.gradients(params, self.episode.query_x, self.episode.query_y)[0]

    def query_losses(self, params: Tree) -> Tensor:
        """Each task's query loss, (T,), at its own stacked parameters."""
        return self.objective.losses(params, self.episode.query_x, self.episode.query_y)
