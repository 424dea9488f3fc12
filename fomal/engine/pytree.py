"""Tensors in nested dicts and tuples.

Torch's own pytrees do the same in ten times the time, which shows beside the steps of a small network.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from fomal.utils.tree import Tree

_NOTHING = torch.empty(0)


def flatten(value: Any) -> tuple[list[Tensor], list[Hashable]]:
    """The tensors in nested dicts and (named) tuples, in order, and all else: names, kinds of tuples, other values."""
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
    elif isinstance(value, tuple):
        form.append(type(value))
        form.append(len(value))
        for part in value:
            _collect(part, leaves, form)
    else:
        form.append(value)


def unflatten(like: Any, leaves: Iterable[Any]) -> Any:
    """The same dicts and tuples as `like` with other tensors, in the order of `flatten`."""
    return _filled(like, iter(leaves))


def _filled(like: Any, leaves: Iterator[Any]) -> Any:
    if isinstance(like, Tensor):
        return next(leaves)
    if isinstance(like, dict):
        return {name: _filled(part, leaves) for name, part in like.items()}
    if isinstance(like, tuple):
        parts = [_filled(part, leaves) for part in like]
        return type(like)(*parts) if hasattr(like, "_fields") else tuple(parts)
    return like


def skeleton(value: Any) -> Any:
    """The same dicts and tuples with an empty tensor for each: what `unflatten` needs to know, and nothing more."""
    return unflatten(value, (_NOTHING for _ in flatten(value)[0]))


def signature(leaves: list[Tensor]) -> tuple[Hashable, ...]:
    """What an operation on tensors depends on beside their values: shapes, dtypes, devices, autocast."""
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
    if isinstance(value, dict | tuple):
        inner = value.values() if isinstance(value, dict) else value
        return [found for part in inner for found in parts(part)]
    return []
