"""Tensors in nested dicts, tuples and lists.

Torch's own pytrees do the same in ten times the time, which shows beside the steps of a small network.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fomal.utils.tree import Tree

Data = Any
"""A tensor, or nested dicts of tensors, each in a dtype of its own: inputs, targets, or outputs."""

_NOTHING = torch.empty(0)


def flatten(value: Any) -> tuple[list[Tensor], list[Hashable]]:
    """The tensors in nested dicts, (named) tuples and lists, in order, and all else: names, kinds, other values."""
    leaves: list[Tensor] = []
    form: list[Hashable] = []
    _collect(value, leaves, form)
    return leaves, form


def _collect(value: Any, leaves: list[Tensor], form: list[Hashable]) -> None:
    if isinstance(value, Tensor):
        leaves.append(value)
    elif isinstance(value, dict):
        form.append(dict)
        form.append(tuple(value))
        for part in value.values():
            _collect(part, leaves, form)
    elif isinstance(value, tuple | list):
        form.append(type(value))
        form.append(len(value))
        for part in value:
            _collect(part, leaves, form)
    else:
        form.append(value)


def unflatten(like: Any, leaves: Iterable[Any]) -> Any:
    """The same dicts, tuples and lists as `like` with other tensors, in the order of `flatten`."""
    return _filled(like, iter(leaves))


def _filled(like: Any, leaves: Iterator[Any]) -> Any:
    if isinstance(like, Tensor):
        return next(leaves)
    if isinstance(like, dict):
        return {name: _filled(part, leaves) for name, part in like.items()}
    if isinstance(like, tuple):
        parts = [_filled(part, leaves) for part in like]
        return type(like)(*parts) if hasattr(like, "_fields") else tuple(parts)
    if isinstance(like, list):
        return [_filled(part, leaves) for part in like]
    return like


def is_data(value: Any) -> bool:
    """Tell whether it is a tensor, or nested dicts of tensors, none of them empty."""
    if isinstance(value, dict):
        return bool(value) and all(map(is_data, value.values()))
    return isinstance(value, Tensor)


def leaves(value: Any) -> list[Tensor]:
    """The tensors of `flatten` alone."""
    return [value] if isinstance(value, Tensor) else flatten(value)[0]


def named(value: Data, name: str) -> Iterator[tuple[str, Any]]:
    """The tensors of nested dicts, and whatever stands in their place, each with its name, e.g. `x.tokens`."""
    if not isinstance(value, dict):
        yield name, value
        return
    for key, part in value.items():
        yield from named(part, f"{name}.{key}")


def map_leaves(fn: Callable[..., Any], value: Any, *others: Any) -> Any:
    """`fn` of each tensor, with those in the same places of `others`, which are built alike (dicts in any order)."""
    if isinstance(value, Tensor):
        return fn(value, *others)
    if isinstance(value, dict):
        return {name: map_leaves(fn, part, *(other[name] for other in others)) for name, part in value.items()}
    if isinstance(value, tuple | list):
        parts = [map_leaves(fn, *part) for part in zip(value, *others, strict=True)]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value


def stack(values: Sequence[Any]) -> Any:
    """Tensors that are built alike as one, each stacked along a new first axis."""
    return map_leaves(lambda *parts: torch.stack(parts), *values)


def described(value: Any, axes: int = 0) -> str:
    """Shapes, without the first `axes`, and dtypes, for a message: "{'ids': (5,) of torch.int64}"."""
    if isinstance(value, Tensor):
        return f"{tuple(value.shape[axes:])} of {value.dtype}"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name!r}: {described(part, axes)}" for name, part in value.items()) + "}"
    return f"a {type(value).__name__}"


def skeleton(value: Any) -> Any:
    """The same dicts, tuples and lists with an empty tensor for each: all that `unflatten` needs to know."""
    return unflatten(value, (_NOTHING for _ in flatten(value)[0]))


def signature(leaves: list[Tensor]) -> tuple[Hashable, ...]:
    """All that an operation on tensors depends on beside their values: shapes, dtypes, devices, autocast."""
    return (*((leaf.shape, leaf.dtype, leaf.device) for leaf in leaves), autocast_dtype(leaves[0].device.type))


def autocast_dtype(device: str) -> torch.dtype | None:
    """The dtype that autocast computes in on a kind of device, where it is on."""
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return None


def parts(value: Any) -> list[Tree]:
    """The dicts of tensors in a value, and its loose tensors, each as a dict; numbers without a fraction in float64."""
    if isinstance(value, Tensor):
        return [{"": value if value.is_floating_point() else value.double()}]
    if isinstance(value, dict) and all(isinstance(part, Tensor) for part in value.values()):
        return [{name: parts(t)[0][""] for name, t in value.items()}] if value else []
    if isinstance(value, dict | tuple | list):
        inner = value.values() if isinstance(value, dict) else value
        return [found for part in inner for found in parts(part)]
    return []
