"""The checks of an episode, and the words in which it is refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fomal.utils.pytree import Data, leaves, named

Episode = Any
"""A `fomal.tasks.episode.Episode`, which is above this."""

FIELDS = ("support_x", "support_y", "query_x", "query_y")
NO_TARGET = torch.iinfo(torch.int64).min
"""In place of a label: it counts neither in a loss nor in an accuracy. Torch's own, -100, may be a mistake."""
KINDS = ("training", "validation", "test")
"""The episodes of each of `fomal.tasks.sampler.SPLITS`, in messages."""


def check_episode(episode: Episode) -> None:
    """See `Episode.check`."""
    _check_types(episode)
    tasks = _check_tasks(episode)
    for part in ("support", "query"):
        _check_examples(part, getattr(episode, f"{part}_x"), getattr(episode, f"{part}_y"))
    if not episode.support_examples:
        raise ValueError("Episode.support_x has no examples: a task needs one at least to adapt on.")
    _check_likeness(episode)
    _check_sizes(episode, tasks)
    _check_task_tensors(episode)
    if isinstance(episode.support_y, Tensor) and isinstance(episode.query_y, Tensor):
        _check_targets(episode)


def _check_types(episode: Episode) -> None:
    for field in (*FIELDS, "number"):
        value = getattr(episode, field)
        if field != "number" and isinstance(value, Mapping) and not leaves(value):
            raise ValueError(f"Episode.{field} is an empty dict: give it tensors.")
        for name, part in named(value, field) if field != "number" else [(field, value)]:
            if not isinstance(part, Tensor):
                raise ValueError(
                    f"Episode.{name} is a {type(part).__name__}: give a tensor, by torch.as_tensor or torch.stack."
                )
    for name in ("ways", "seed", "split"):
        value = getattr(episode, name)
        if not isinstance(value, int) or isinstance(value, bool):
            raise ValueError(
                f"Episode.{name} is a {type(value).__name__}: give an integer; a DataLoader of episodes needs "
                f"batch_size=None, since each is a whole meta-batch."
            )
    if not 0 <= episode.split < len(KINDS):
        raise ValueError(f"Episode.split={episode.split} must be 0 (train), 1 (val) or 2 (test).")


def _check_tasks(episode: Episode) -> int:
    """The number of tasks, the same in all fields."""
    (first, t), *_ = named(episode.support_x, "support_x")
    tasks = len(t) if t.ndim else 0
    for field in (*FIELDS, "number"):
        for name, value in named(getattr(episode, field), field):
            if value.ndim < 1 or value.shape[0] != tasks:
                raise ValueError(
                    f"Episode.{name} has shape {tuple(value.shape)}, but {first} has {tasks} tasks: "
                    f"put the task axis first, of the same length in every field."
                )
    if not tasks:
        raise ValueError("Episode.support_x has no tasks: give one at least.")
    if episode.number.ndim != 1 or episode.number.dtype != torch.int64:
        shape, dtype = tuple(episode.number.shape), episode.number.dtype
        raise ValueError(f"Episode.number has shape {shape} and {dtype}: give (tasks,) int64.")
    return tasks


def _check_examples(part: str, x: Data, y: Data) -> None:
    """Refuse tensors of one set that have no examples, or not equally many."""
    all_x, all_y = list(named(x, f"{part}_x")), list(named(y, f"{part}_y"))
    (first, a), others = all_x[0], [*all_x[1:], *all_y]
    for name, b in others:
        if a.ndim < 2 or b.ndim < 2 or a.shape[1] != b.shape[1]:
            raise ValueError(
                f"Episode.{first} has shape {tuple(a.shape)} and {name} {tuple(b.shape)}: "
                f"they need (tasks, examples, ...) with the same number of examples."
            )


def _check_likeness(episode: Episode) -> None:
    """Refuse tensors of the support set that the query set has in another form; dicts may differ."""
    support_x, query_x = episode.support_x, episode.query_x
    if isinstance(support_x, Mapping) != isinstance(query_x, Mapping):
        raise ValueError("Episode.support_x or query_x alone is a dict: give dicts in both.")
    if isinstance(support_x, Tensor) and (support_x.shape[2:] != query_x.shape[2:] or support_x.dtype != query_x.dtype):
        raise ValueError(
            f"Episode.query_x has input shape {tuple(query_x.shape[2:])} and {query_x.dtype}, support_x has "
            f"{tuple(support_x.shape[2:])} and {support_x.dtype}: support and query need the same input shape and "
            f"dtype, unless they are dicts."
        )


def _check_sizes(episode: Episode, tasks: int) -> None:
    for name, low, high in (
        ("support_size", 1, episode.support_examples),
        ("query_size", 0, episode.query_examples),
    ):
        _check_per_task(name, getattr(episode, name), tasks, torch.int64)
        size = getattr(episode, name)
        if size is not None and size.device.type == "cpu" and not (low <= size.min() and size.max() <= high):
            raise ValueError(f"Episode.{name}={size.tolist()} must be from {low} to {high}, the examples there are.")
    weight = episode.weight
    if weight is not None:
        _check_per_task("weight", weight, tasks, weight.dtype if weight.is_floating_point() else torch.float32)
        if weight.device.type == "cpu" and not (weight.isfinite().all() and weight.min() >= 0):
            raise ValueError(f"Episode.weight={weight.tolist()} must be finite and not negative.")


def _check_per_task(name: str, value: Any, tasks: int, dtype: torch.dtype) -> None:
    if value is None:
        return
    if not isinstance(value, Tensor) or value.shape != (tasks,) or value.dtype != dtype:
        found = f"has shape {tuple(value.shape)} and {value.dtype}" if isinstance(value, Tensor) else f"is {value!r}"
        raise ValueError(f"Episode.{name} {found}: give a tensor ({tasks},) of {dtype}, one number for each task.")


def _check_task_tensors(episode: Episode) -> None:
    if episode.task is None:
        return
    if not isinstance(episode.support_x, Mapping):
        raise ValueError("Episode.task goes to the network beside inputs that are dicts: give support_x as one too.")
    for name, t in episode.task.items():
        if not isinstance(t, Tensor) or not t.ndim or len(t) != episode.tasks:
            found = tuple(t.shape) if isinstance(t, Tensor) else type(t).__name__
            raise ValueError(f"Episode.task.{name} is {found}: give a tensor ({episode.tasks}, ...), by task.")
        if name in episode.support_x or name in episode.query_x:
            raise ValueError(f"Episode.task.{name} is a name of the inputs too: give it another.")


def _check_targets(episode: Episode) -> None:
    support_y, query_y = episode.support_y, episode.query_y
    if support_y.dtype != query_y.dtype:
        raise ValueError(
            f"Episode.query_y is {query_y.dtype}, support_y is {support_y.dtype}: "
            f"use int64 labels in both, or floating-point targets in both."
        )
    if support_y.shape[2:] != query_y.shape[2:]:
        raise ValueError(
            f"Episode.query_y has shape {tuple(query_y.shape[2:])} per example, support_y has "
            f"{tuple(support_y.shape[2:])}: support and query need the same target shape."
        )
    if episode.is_regression:
        if episode.ways != 1:
            raise ValueError(
                f"Episode.support_y is {support_y.dtype}, as for a regression, but ways={episode.ways}: give "
                f"int64 labels (y.long()), or ways=1 for targets."
            )
        return
    for name, size in (("support_y", episode.support_size), ("query_y", episode.query_size)):
        _check_labels(episode, name, getattr(episode, name), size)


def _check_labels(episode: Episode, name: str, y: Tensor, size: Tensor | None) -> None:
    if y.dtype != torch.int64:
        raise ValueError(f"Episode.{name} is {y.dtype}: give int64 labels, by y.long(), or targets, by y.float().")
    if episode.ways < 2:
        raise ValueError(
            f"Episode.ways={episode.ways} with the labels of a classification: give the number of classes, at least 2."
        )
    if y.device.type != "cpu" or not y.numel():
        return
    if size is not None:  # padding is no label
        is_there = torch.arange(y.shape[1]) < size[:, None]  # (T, S)
        y = y.where(is_there.view(*is_there.shape, *[1] * (y.ndim - 2)), NO_TARGET)
    low, high = (int(value) for value in y.aminmax())
    if low == NO_TARGET:
        low = int(y.where(y != NO_TARGET, 0).min())
    if low < 0 or high >= episode.ways:
        value = low if low < 0 else high
        number = episode.number[(y == value).flatten(1).any(1)][0].item()
        raise ValueError(
            f"Episode.{name} has the label {value} in {KINDS[episode.split]} episode {number}, but "
            f"ways={episode.ways}: labels are 0 to {episode.ways - 1}; of those from 1 take one off; NO_TARGET leaves "
            f"one out."
        )
