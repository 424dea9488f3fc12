"""The episode: one batch of few-shot tasks, the task axis first."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Numbers(NamedTuple):
    """T training tasks by their numbers alone, to be drawn where these are.

    Attributes:
        number: (T,) int64, the number of each task in the stream of its split.
        seed: the seed of that stream.
        split: the split's place in `fomal.data.sampler.SPLITS`.
    """

    number: Tensor
    seed: int = 0
    split: int = 0


class Episode(NamedTuple):
    """T tasks with their support and query sets.

    Classification has int64 labels in [0, ways); regression has floating-point targets.
    Each task lists its support examples class by class, equally many of each.

    Attributes:
        support_x: (T, S, *input), the examples to adapt on.
        support_y: (T, S) labels or (T, S, *output) targets.
        query_x: (T, Q, *input), the held-out examples; Q may be 0.
        query_y: (T, Q) or (T, Q, *output).
        number: (T,) int64, the number of each task in the stream of its split.
        ways: number of classes; 1 for regression.
        seed: the seed of that stream.
        split: the split's place in `fomal.data.sampler.SPLITS`.
    """

    support_x: Tensor
    support_y: Tensor
    query_x: Tensor
    query_y: Tensor
    number: Tensor
    ways: int = 1
    seed: int = 0
    split: int = 0

    @classmethod
    def of_classes(cls, support: Tensor, query: Tensor, number: Tensor, seed: int, split: int) -> Episode:
        """Classification tasks from inputs (T, ways, shots, *input) and (T, ways, query shots, *input) by class."""
        tasks, ways = support.shape[:2]
        label = torch.arange(ways, device=support.device)[:, None]
        support_y, query_y = (label.expand(-1, x.shape[2]).flatten().expand(tasks, -1) for x in (support, query))
        return cls(support.flatten(1, 2), support_y, query.flatten(1, 2), query_y, number, ways, seed, split)

    @property
    def tasks(self) -> int:
        """Number of tasks T."""
        return self.support_x.shape[0]

    @property
    def is_regression(self) -> bool:
        """Whether the targets are floating-point numbers."""
        return self.support_y.is_floating_point()

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Episode:
        """The same episode with every tensor on `device`."""
        return self.map(lambda t: t.to(device, non_blocking=non_blocking))

    def select(self, tasks: Tensor) -> Episode:
        """The tasks of the given places, an int64 index into the T tasks."""
        return self.map(lambda t: t[tasks])

    def map(self, fn: Callable[[Tensor], Tensor]) -> Episode:
        """Apply `fn` to every tensor."""
        return self._replace(
            support_x=fn(self.support_x),
            support_y=fn(self.support_y),
            query_x=fn(self.query_x),
            query_y=fn(self.query_y),
            number=fn(self.number),
        )

    def floating(self, dtype: torch.dtype) -> Episode:
        """Inputs, and targets of a regression, in the floating-point `dtype`."""
        episode = self._replace(support_x=self.support_x.to(dtype), query_x=self.query_x.to(dtype))
        if not self.is_regression:
            return episode
        return episode._replace(support_y=self.support_y.to(dtype), query_y=self.query_y.to(dtype))

    def check(self) -> Episode:
        """Raise ValueError, naming the field and its shape, unless the fields fit together; return self."""
        tasks = self.tasks
        for name, value in self._asdict().items():
            if isinstance(value, Tensor) and (value.ndim < 1 or value.shape[0] != tasks):
                raise ValueError(
                    f"Episode.{name} has shape {tuple(value.shape)}, but support_x has {tasks} tasks: "
                    f"put the task axis first, of the same length in every field."
                )
        for part in ("support", "query"):
            x, y = getattr(self, f"{part}_x"), getattr(self, f"{part}_y")
            if x.ndim < 2 or y.ndim < 2 or x.shape[1] != y.shape[1]:
                raise ValueError(
                    f"Episode.{part}_x has shape {tuple(x.shape)} and {part}_y {tuple(y.shape)}: "
                    f"they need (tasks, examples, ...) with the same number of examples."
                )
        if self.support_x.shape[2:] != self.query_x.shape[2:]:
            raise ValueError(
                f"Episode.query_x has input shape {tuple(self.query_x.shape[2:])}, support_x has "
                f"{tuple(self.support_x.shape[2:])}: support and query need the same input shape."
            )
        if self.is_regression != self.query_y.is_floating_point():
            raise ValueError(
                f"Episode.query_y is {self.query_y.dtype}, support_y is {self.support_y.dtype}: "
                f"use int64 labels in both, or floating-point targets in both."
            )
        return self
