"""The episode: one batch of few-shot tasks, the task axis first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

FIELDS = ("support_x", "support_y", "query_x", "query_y")
NO_TARGET = torch.iinfo(torch.int64).min
"""In place of a label: it counts neither in a loss nor in an accuracy. Torch's own, -100, may be a mistake."""
KINDS = ("training", "validation", "test")
"""The episodes of each of `fomal.tasks.sampler.SPLITS`, in messages."""


class Numbers(NamedTuple):
    """T training tasks by their numbers alone, to be drawn where these are.

    Attributes:
        number: (T,) int64, the number of each task in the stream of its split.
        seed: the seed of that stream.
        split: the split's place in `fomal.tasks.sampler.SPLITS`.
    """

    number: Tensor
    seed: int = 0
    split: int = 0


class Episode(NamedTuple):
    """T tasks with their support and query sets.

    Classification has int64 labels in [0, ways), or `NO_TARGET`; regression has floating-point targets.
    Where each example has one label, a task lists its support examples class by class, equally many of each.

    Attributes:
        support_x: (T, S, *input), the examples to adapt on.
        support_y: labels (T, S), or (T, S, *places) of which an example has many, or targets (T, S, *output).
        query_x: (T, Q, *input), the held-out examples; Q may be 0.
        query_y: likewise, (T, Q, ...).
        number: (T,) int64, the number of each task in the stream of its split.
        ways: number of classes; 1 for regression.
        seed: the seed of that stream.
        split: the split's place in `fomal.tasks.sampler.SPLITS`.
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

    @classmethod
    def join(cls, episodes: Sequence[Episode]) -> Episode:
        """The tasks of several episodes as one; ways, seed and split are the first's."""
        joined = {name: torch.cat([getattr(part, name) for part in episodes]) for name in (*FIELDS, "number")}
        return episodes[0]._replace(**joined)  # type: ignore[arg-type]

    @property
    def tasks(self) -> int:
        """Number of tasks T."""
        return self.support_x.shape[0]

    @property
    def is_regression(self) -> bool:
        """Whether the targets are floating-point numbers."""
        return self.support_y.is_floating_point()

    @property
    def blocks(self) -> int:
        """How many blocks of equally many examples a task lists its support in: its classes, where it is by class."""
        return self.ways if self.support_y.ndim == 2 else 1

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
        """Floating-point inputs, and targets of a regression, in `dtype`; integers, such as token ids, stay so."""

        def cast(t: Tensor) -> Tensor:
            return t.to(dtype) if t.is_floating_point() else t

        episode = self._replace(support_x=cast(self.support_x), query_x=cast(self.query_x))
        return episode._replace(support_y=cast(self.support_y), query_y=cast(self.query_y))

    def check(self) -> Episode:
        """Refuse fields that do not fit together, or are no labels; return self.

        The values of labels are looked at on the CPU alone: other devices would have to be waited for, and torch ends
        a process there at a wrong label, if with less to say.

        Raises:
            ValueError: naming field, value and remedy.
        """
        self._check_types()
        self._check_shapes()
        self._check_targets()
        return self

    def refuse_nonfinite(self) -> None:
        """Raise ValueError where an input or target is infinite or NaN, naming field and episodes."""
        if found := self.nonfinite():
            raise ValueError(f"the {found} is not finite: mend the data, or leave it out.")

    def nonfinite(self) -> str:
        """The first field with values that are infinite or NaN, and the episodes: "support_x of test episode 3, 7"."""
        for name in FIELDS:
            t = getattr(self, name)
            if t.is_floating_point() and not t.sum().isfinite():  # quickly, for most
                bad = ~t.isfinite().flatten(1).all(1)
                if bad.any():
                    numbers = ", ".join(map(str, self.number[bad].tolist()))
                    return f"{name} of {KINDS[self.split]} episode {numbers}"
        return ""

    def _check_types(self) -> None:
        for name in (*FIELDS, "number"):
            value = getattr(self, name)
            if not isinstance(value, Tensor):
                raise ValueError(
                    f"Episode.{name} is a {type(value).__name__}: give a tensor, by torch.as_tensor or torch.stack."
                )
        for name in ("ways", "seed", "split"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise ValueError(
                    f"Episode.{name} is a {type(value).__name__}: give an integer; a DataLoader of episodes needs "
                    f"batch_size=None, since each is a whole meta-batch."
                )
        if not 0 <= self.split < len(KINDS):
            raise ValueError(f"Episode.split={self.split} must be 0 (train), 1 (val) or 2 (test).")

    def _check_shapes(self) -> None:
        tasks = self.support_x.shape[0] if self.support_x.ndim else 0
        for name in (*FIELDS, "number"):
            value = getattr(self, name)
            if value.ndim < 1 or value.shape[0] != tasks:
                raise ValueError(
                    f"Episode.{name} has shape {tuple(value.shape)}, but support_x has {tasks} tasks: "
                    f"put the task axis first, of the same length in every field."
                )
        if not tasks:
            raise ValueError("Episode.support_x has no tasks: give one at least.")
        for part in ("support", "query"):
            x, y = getattr(self, f"{part}_x"), getattr(self, f"{part}_y")
            if x.ndim < 2 or y.ndim < 2 or x.shape[1] != y.shape[1]:
                raise ValueError(
                    f"Episode.{part}_x has shape {tuple(x.shape)} and {part}_y {tuple(y.shape)}: "
                    f"they need (tasks, examples, ...) with the same number of examples."
                )
        if not self.support_x.shape[1]:
            raise ValueError("Episode.support_x has no examples: a task needs one at least to adapt on.")
        if self.support_x.shape[2:] != self.query_x.shape[2:] or self.support_x.dtype != self.query_x.dtype:
            raise ValueError(
                f"Episode.query_x has input shape {tuple(self.query_x.shape[2:])} and {self.query_x.dtype}, support_x "
                f"has {tuple(self.support_x.shape[2:])} and {self.support_x.dtype}: support and query need the same "
                f"input shape and dtype."
            )
        if self.number.ndim != 1 or self.number.dtype != torch.int64:
            raise ValueError(
                f"Episode.number has shape {tuple(self.number.shape)} and {self.number.dtype}: give (tasks,) int64."
            )

    def _check_targets(self) -> None:
        if self.support_y.dtype != self.query_y.dtype:
            raise ValueError(
                f"Episode.query_y is {self.query_y.dtype}, support_y is {self.support_y.dtype}: "
                f"use int64 labels in both, or floating-point targets in both."
            )
        if self.support_y.shape[2:] != self.query_y.shape[2:]:
            raise ValueError(
                f"Episode.query_y has shape {tuple(self.query_y.shape[2:])} per example, support_y has "
                f"{tuple(self.support_y.shape[2:])}: support and query need the same target shape."
            )
        if self.is_regression:
            if self.ways != 1:
                raise ValueError(
                    f"Episode.support_y is {self.support_y.dtype}, as for a regression, but ways={self.ways}: give "
                    f"int64 labels (y.long()), or ways=1 for targets."
                )
            return
        for name in ("support_y", "query_y"):
            self._check_labels(name, getattr(self, name))

    def _check_labels(self, name: str, y: Tensor) -> None:
        if y.dtype != torch.int64:
            raise ValueError(f"Episode.{name} is {y.dtype}: give int64 labels, by y.long(), or targets, by y.float().")
        if self.ways < 2:
            raise ValueError(
                f"Episode.ways={self.ways} with the labels of a classification: give the number of classes, at least 2."
            )
        if y.device.type != "cpu" or not y.numel():
            return
        low, high = (int(value) for value in y.aminmax())
        if low == NO_TARGET:
            low = int(y.where(y != NO_TARGET, 0).min())
        if low < 0 or high >= self.ways:
            value = low if low < 0 else high
            episode = self.number[(y == value).flatten(1).any(1)][0].item()
            raise ValueError(
                f"Episode.{name} has the label {value} in {KINDS[self.split]} episode {episode}, but ways={self.ways}: "
                f"labels are 0 to {self.ways - 1}; of those from 1 take one off; NO_TARGET leaves one out."
            )


def refuse_others(batch: object) -> None:
    """Raise ValueError unless a loader's batch is an `Episode` whose fields fit, or numbers of episodes."""
    if isinstance(batch, Episode):
        batch.check()
    elif not isinstance(batch, Numbers):
        raise ValueError(
            f"the loader gives a {type(batch).__name__} where a meta-batch is wanted: let it yield "
            f"fomal.tasks.episode.Episode, with batch_size=None."
        )
