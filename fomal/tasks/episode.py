"""The episode: one batch of few-shot tasks, the task axis first."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fomal.tasks.episode_checks import FIELDS, KINDS, NO_TARGET, check_episode
from fomal.utils.pytree import Data, leaves, map_leaves, named

__all__ = ["FIELDS", "KINDS", "NO_TARGET", "Episode", "Numbers", "refuse_others"]


class Numbers(NamedTuple):
    """T training tasks by their numbers alone, to be sampled where these are.

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

    Inputs and targets are tensors or nested dicts of tensors, each in its dtype. Support and query sets of dicts may
    have different names and shapes; of tensors they have the same.

    Attributes:
        support_x: (T, S, *input), the examples to adapt on.
        support_y: labels (T, S), or (T, S, *places) of which an example has many, or targets (T, S, *output).
        query_x: (T, Q, *input), the held-out examples; Q may be 0.
        query_y: likewise, (T, Q, ...).
        number: (T,) int64, the number of each task in the stream of its split.
        ways: number of classes; 1 for regression.
        seed: the seed of that stream.
        split: the split's place in `fomal.tasks.sampler.SPLITS`.
        support_size: (T,) int64, of tasks of unequal size how many of the S examples there are, from 1 to S: the first
            ones, and what follows is padding. None: all.
        query_size: likewise, of the Q query examples, from 0 to Q.
        weight: (T,) floating point, not negative, how much each task counts in means over tasks. None: all the same.
        task: tensors of the tasks themselves, (T, ...) each, which the network gets with every example, under the same
            names, beside inputs that are dicts.
    """

    support_x: Data
    support_y: Data
    query_x: Data
    query_y: Data
    number: Tensor
    ways: int = 1
    seed: int = 0
    split: int = 0
    support_size: Tensor | None = None
    query_size: Tensor | None = None
    weight: Tensor | None = None
    task: Mapping[str, Tensor] | None = None

    @classmethod
    def of_classes(cls, support: Tensor, query: Tensor, number: Tensor, seed: int, split: int) -> Episode:
        """Classification tasks from inputs (T, ways, shots, *input) and (T, ways, query shots, *input) by class."""
        tasks, ways = support.shape[:2]
        label = torch.arange(ways, device=support.device)[:, None]
        support_y, query_y = (label.expand(-1, x.shape[2]).flatten().expand(tasks, -1) for x in (support, query))
        return cls(support.flatten(1, 2), support_y, query.flatten(1, 2), query_y, number, ways, seed, split)

    @classmethod
    def of_tasks(
        cls, tasks: Sequence[Sequence[Data]], number: Tensor, ways: int = 1, seed: int = 0, split: int = 0
    ) -> Episode:
        """Tasks of unequal size, padded with zeros to the largest.

        Args:
            tasks: for each task support_x (S_t, *input), support_y (S_t, ...), query_x (Q_t, *input) and query_y.
            number: (T,) int64, see `Episode`; also of the others.
            ways: number of classes; 1 for regression.
            seed: of the stream.
            split: place of the split.

        Raises:
            ValueError: tensors of two tasks differ in more than the number of examples.
        """
        columns = dict(zip(FIELDS, zip(*tasks, strict=True), strict=True))
        support_size, query_size = (
            torch.tensor([len(leaves(part)[0]) for part in columns[name]]) for name in ("support_x", "query_x")
        )
        fields = {name: map_leaves(_padded, *column) for name, column in columns.items()}
        whole = cls(**fields, number=number, ways=ways, seed=seed, split=split)
        return whole._replace(support_size=support_size, query_size=query_size)

    @classmethod
    def join(cls, episodes: Sequence[Episode]) -> Episode:
        """The tasks of several episodes as one; ways, seed and split are the first's."""
        first = episodes[0]
        parts = [part._tensors() for part in episodes]
        joined = {name: map_leaves(lambda *t: torch.cat(t), *(part[name] for part in parts)) for name in parts[0]}
        return first._replace(**joined)

    @property
    def tasks(self) -> int:
        """Number of tasks T."""
        return len(self.number)

    @property
    def support_examples(self) -> int:
        """Number of support examples S, with padding."""
        return leaves(self.support_x)[0].shape[1]

    @property
    def query_examples(self) -> int:
        """Number of query examples Q, with padding."""
        return leaves(self.query_x)[0].shape[1]

    @property
    def device(self) -> torch.device:
        """Where the tasks are."""
        return self.number.device

    @property
    def is_regression(self) -> bool:
        """Tell whether the targets are floating-point numbers."""
        return all(t.is_floating_point() for t in leaves(self.support_y))

    @property
    def blocks(self) -> int:
        """The number of blocks of equally many support examples: a task's classes, where it is by class."""
        return self.ways if isinstance(self.support_y, Tensor) and self.support_y.ndim == 2 else 1

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Episode:
        """The same episode with every tensor on `device`."""
        return self.map(lambda t: t.to(device, non_blocking=non_blocking))

    def select(self, tasks: Tensor | slice) -> Episode:
        """The tasks of the given places, an int64 index into the T tasks."""
        return self.map(lambda t: t[tasks])

    def map(self, fn: Callable[[Tensor], Tensor]) -> Episode:
        """Apply `fn` to every tensor."""
        return self._replace(**{name: map_leaves(fn, part) for name, part in self._tensors().items()})

    def _tensors(self) -> dict[str, Data]:
        """The fields that are of tensors."""
        names = (*FIELDS, "number", "support_size", "query_size", "weight", "task")
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    def floating(self, dtype: torch.dtype) -> Episode:
        """Floating-point inputs, and targets of a regression, in `dtype`; integers, such as token ids, stay so."""

        def cast(t: Tensor) -> Tensor:
            return t.to(dtype) if t.is_floating_point() else t

        parts = {name: part for name, part in self._tensors().items() if name in (*FIELDS, "task")}
        return self._replace(**{name: map_leaves(cast, part) for name, part in parts.items()})

    @property
    def is_padded(self) -> bool:
        """True where tasks may be of unequal size."""
        return self.support_size is not None or self.query_size is not None

    def plain(self, what: str) -> Episode:
        """The episode itself, for work that knows tensors and equal tasks alone.

        Raises:
            ValueError: inputs or targets are dicts, or tasks have unequal sizes; `what` is the work.
        """
        if self.is_padded or not all(isinstance(getattr(self, name), Tensor) for name in FIELDS):
            raise ValueError(f"{what} needs tasks of equal size, whose inputs and targets are tensors, not dicts.")
        return self

    def by_size(self) -> list[tuple[Tensor | None, Episode]]:
        """The tasks in groups of equal size, without padding, and each group's places; None: all, in their order.

        Each task is then computed as it would be by itself, also by networks that look at several examples together,
        as batch norm does.
        """
        if not self.is_padded:
            return [(None, self)]
        given = self.support_size, self.query_size
        most = self.support_examples, self.query_examples
        pairs = [t if t is not None else torch.full_like(self.number, n) for t, n in zip(given, most, strict=True)]
        sizes, group = torch.unique(torch.stack(pairs, 1).cpu(), dim=0, return_inverse=True)
        groups = []
        for place, (support, query) in enumerate(sizes.tolist()):
            places = (group == place).nonzero()[:, 0].to(self.device)
            groups.append((places, self.select(places)._cut(support, query)))
        return groups

    def _cut(self, support: int, query: int) -> Episode:
        """The first examples alone, as tasks of equal size."""
        parts = {name: (getattr(self, name), support if name.startswith("support") else query) for name in FIELDS}
        cut = {name: map_leaves(lambda t, size=size: t[:, :size], part) for name, (part, size) in parts.items()}
        return self._replace(**cut, support_size=None, query_size=None)

    def with_task_tensors(self) -> Episode:
        """With the tensors of `task` among the inputs, expanded to each example, without using memory for it."""
        if not self.task:
            return self

        def joined(x: Mapping[str, Data], examples: int) -> Data:
            assert self.task is not None
            own = {name: t[:, None].expand(-1, examples, *t.shape[1:]) for name, t in self.task.items()}
            return {**x, **own}

        support = joined(self.support_x, self.support_examples)
        query = joined(self.query_x, self.query_examples)
        return self._replace(support_x=support, query_x=query, task=None)

    def check(self) -> Episode:
        """Refuse fields that do not fit together, or are no labels; return self.

        Values, of labels and sizes, are looked at on the CPU alone: other devices would have to be waited for, and
        torch ends a process there at a wrong label, if with less to say.

        Raises:
            ValueError: naming field, value and remedy.
        """
        check_episode(self)
        return self

    def refuse_nonfinite(self) -> None:
        """Raise ValueError where an input or target is infinite or NaN, naming field and episodes."""
        if found := self.nonfinite():
            raise ValueError(f"the {found} is not finite: mend the data, or leave it out.")

    def nonfinite(self) -> str:
        """The first field with values that are infinite or NaN, and the episodes: "support_x of test episode 3, 7"."""
        parts = {name: part for name, part in self._tensors().items() if name in (*FIELDS, "task")}
        for _, group in self.by_size():
            for name, t in named({name: getattr(group, name) for name in parts}, ""):
                if t.is_floating_point() and not t.sum().isfinite():  # quickly, for most
                    bad = ~t.isfinite().flatten(1).all(1)
                    if bad.any():
                        numbers = ", ".join(map(str, group.number[bad].tolist()))
                        return f"{name[1:]} of {KINDS[self.split]} episode {numbers}"
        return ""


def _padded(*parts: Tensor) -> Tensor:
    """Tensors (n_t, ...) of each task as one, (T, n, ...), with zeros at the end."""
    forms = {(t.shape[1:], t.dtype) for t in parts}
    if len(forms) > 1:
        found = " and ".join(f"{tuple(shape)} of {dtype}" for shape, dtype in forms)
        raise ValueError(f"tasks have examples of shape {found}: give all the same.")
    longest = max(map(len, parts))
    return torch.stack([F.pad(t, [0, 0] * (t.ndim - 1) + [0, longest - len(t)]) for t in parts])


def refuse_others(batch: object) -> None:
    """Raise ValueError unless a loader's batch is an `Episode` whose fields fit, or numbers of episodes."""
    if isinstance(batch, Episode):
        batch.check()
    elif not isinstance(batch, Numbers):
        raise ValueError(
            f"the loader gives a {type(batch).__name__} where a meta-batch is wanted: let it yield "
            f"fomal.tasks.episode.Episode, with batch_size=None."
        )
