"""The setting of the analysis: exchangeable mini-batches of tasks, at an initialisation."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch

from fomal.engine.functional import plain_attention
from fomal.inner import SGD
from fomal.inner.loop import InnerLoop, gather_examples
from fomal.inner.objective import Objective
from fomal.outer.rule import OuterRule
from fomal.tasks.episode import Episode
from fomal.tasks.sampler import MinibatchIndices, minibatch_indices
from fomal.utils import tree
from fomal.utils.tree import Tree


@dataclass(frozen=True)
class Problem:
    """n mini-batches of each of T tasks, sampled independently from the task's examples, and an initialisation.

    A rule's inner loop takes one mini-batch a step; rules with a query set take the last one for it, and so one step
    less, as in the paper's analysis.

    Attributes:
        objective: losses and gradients of the network.
        start: the initialisation, not stacked.
        episode: the tasks, all their examples in the support set.
        indices: n index tensors (T, B).
    """

    objective: Objective
    start: Tree
    episode: Episode
    indices: MinibatchIndices

    @classmethod
    def sample(cls, objective: Objective, start: Tree, episode: Episode, batches: int, batch_size: int) -> Problem:
        """Sample `batches` mini-batches of `batch_size` from the support and query examples of each task.

        Raises:
            ValueError: fewer than two mini-batches, or more examples in one than a task has; or see `Episode.plain`.
        """
        episode.plain("the expansion of outer gradients")
        examples = episode.support_x.shape[1] + episode.query_x.shape[1]
        if batches < 2:
            raise ValueError(f"batches={batches} must be at least 2: AvgGradInner takes two mini-batches of a task.")
        if not 1 <= batch_size <= examples:
            raise ValueError(
                f"batch_size={batch_size} must be from 1 to {examples}, the examples of a task: change it, "
                f"or data.train_shots."
            )
        pooled = episode._replace(
            support_x=torch.cat([episode.support_x, episode.query_x], 1),
            support_y=torch.cat([episode.support_y, episode.query_y], 1),
        ).floating(next(iter(start.values())).dtype)
        stream = (episode.seed, episode.split, episode.number)
        indices = minibatch_indices(*stream, examples, batches, batch_size, replacement=True)
        return cls(objective, start, pooled, indices)

    def gradients(self) -> Tree:
        """The gradient on each mini-batch at the initialisation, (n, T, ...)."""
        return self._unflatten(self.objective.gradients(*self._flat())[0])

    def hessian_products(self, vectors: Tree) -> Tree:
        """The Hessian on each mini-batch at the initialisation, times a vector of its own: (n, T, ...) both."""
        flat = {name: v.flatten(0, 1) for name, v in vectors.items()}
        return self._unflatten(self.objective.hessian_products(*self._flat(), flat))

    def outer_gradient(self, rule: OuterRule, lr: float) -> Tree:
        """The rule's outer gradient under inner SGD of step size `lr`, divided by `lr` where made of displacements."""
        steps = len(self.indices) - rule.needs_query
        episode = self.episode
        if rule.needs_query:
            support = episode.support_x, episode.support_y
            query_x, query_y = (gather_examples(part, self.indices[-1]) for part in support)
            episode = episode._replace(query_x=query_x, query_y=query_y)
        inner = InnerLoop(self.objective, SGD(lr), {}, self.indices[:steps], episode)
        with plain_attention() if rule.differentiates else nullcontext():
            gradient, _ = rule(inner, self.start)
        expansion = rule.expansion(steps)
        return tree.scaled(gradient, 1 / lr) if expansion is not None and expansion.of_displacements else gradient

    def _flat(self) -> tuple[Tree, torch.Tensor, torch.Tensor]:
        """Parameters, x and y with mini-batches and tasks in one axis, (n T, ...)."""
        index = torch.cat(self.indices)  # (n T, B)
        x, y = (part.repeat(len(self.indices), *[1] * (part.ndim - 1)) for part in self._examples())
        return tree.stack(self.start, len(index)), gather_examples(x, index), gather_examples(y, index)

    def _examples(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.episode.support_x, self.episode.support_y

    def _unflatten(self, values: Tree) -> Tree:
        return {name: v.view(len(self.indices), -1, *v.shape[1:]) for name, v in values.items()}
