"""Gradient descent with Langevin noise (Welling & Teh 2011)."""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy

import torch
from torch import Tensor

from fomal.inner.optimizer import SHARED, InnerOptimizer, State, descend
from fomal.tasks.philox import normal
from fomal.tasks.sampler import noise_words
from fomal.utils import tree
from fomal.utils.checks import nonnegative
from fomal.utils.tree import Tree


class SGLD(InnerOptimizer):
    """p <- p - lr (g + weight_decay p) + sqrt(2 lr temperature) xi, with xi standard normal.

    For small lr and full batches, the steps sample from exp(-loss / temperature). The noise is a pure function of
    the stream's seed, the episode and the number of the step, so that it is the same on any number of processes and
    after resuming. Temperature 0 is `SGD`.

    Args:
        lr: step size.
        temperature: strength of the noise, in units of the loss.
        weight_decay: L2 penalty.
    """

    def __init__(self, lr: float = 0.01, temperature: float = 1e-4, weight_decay: float = 0.0) -> None:
        nonnegative(lr=lr, temperature=temperature, weight_decay=weight_decay)
        self.lr: float | Tensor = lr
        self.temperature, self.weight_decay = temperature, weight_decay
        self._tasks: tuple[int, int, Tensor] | None = None

    def for_tasks(self, seed: int, split: int, number: Tensor) -> SGLD:
        """This optimiser with the noise of these episodes."""
        bound = copy(self)
        bound._tasks = (seed, split, number)
        return bound

    def init(self, params: Mapping[str, Tensor]) -> State:
        """A step count of zero, (), int64."""
        device = next(iter(params.values())).device
        return {SHARED: {"steps": torch.zeros((), dtype=torch.int64, device=device)}}

    def update(self, gradient: Tree, state: State, params: Tree) -> tuple[Tree, State]:
        """One step of stacked parameters.

        Raises:
            RuntimeError: without `for_tasks`, which says whose noise it is.
        """
        steps = state[SHARED]["steps"]
        if self.weight_decay:
            gradient = tree.add_scaled(gradient, params, self.weight_decay)
        moved = descend(params, self.lr, gradient)
        if self.temperature:
            moved = descend(moved, -((2 * self.temperature * self.lr) ** 0.5), self._noise(steps, params))
        return moved, {SHARED: {"steps": steps + 1}}

    def _noise(self, steps: Tensor, params: Tree) -> Tree:
        if self._tasks is None:
            raise RuntimeError("SGLD samples its noise by episode: call for_tasks(seed, split, number) before update.")
        seed, split, number = self._tasks
        sizes = [p[0].numel() for p in params.values()]
        total = sum(sizes)
        words = noise_words(seed, split, number, steps, total + total % 2)
        parts = torch.split(normal(words)[:, :total], sizes, dim=1)  # (T, size) each
        return {name: x.to(p.dtype).view(p.shape) for (name, p), x in zip(params.items(), parts, strict=True)}
