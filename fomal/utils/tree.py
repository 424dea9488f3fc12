"""Arithmetic on parameter dicts: name -> tensor; "stacked" means with the task axis in front."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

Tree = dict[str, Tensor]


def stack(tree: Mapping[str, Tensor], tasks: int) -> Tree:
    """One copy for each of `tasks` tasks, (T, ...), without using memory for them."""
    return {name: t.expand(tasks, *t.shape) for name, t in tree.items()}


def beside(factor: Tensor, t: Tensor) -> Tensor:
    """A factor, of the shape of t's first axes or (), shaped for arithmetic with t and in its dtype."""
    return factor.to(t.dtype).view((*factor.shape, *[1] * (t.dim() - factor.dim())))


def subtract(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> Tree:
    """The difference a - b."""
    return {name: t - b[name] for name, t in a.items()}


def add(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> Tree:
    """The sum a + b."""
    return {name: t + b[name] for name, t in a.items()}


def add_scaled(a: Mapping[str, Tensor], b: Mapping[str, Tensor], scale: float) -> Tree:
    """The sum a + scale * b."""
    return {name: torch.add(t, b[name], alpha=scale) for name, t in a.items()}


def scaled(tree: Mapping[str, Tensor], scale: float) -> Tree:
    """The tree times `scale`."""
    return {name: t * scale for name, t in tree.items()}


def distance(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> Tensor:
    """The Euclidean distance of each task's parameters a, stacked, from the one set of parameters b: (T,)."""
    apart = {name: (t - b[name])[:, None].flatten(1) for name, t in a.items()}  # (T, size), scalars too
    by_name = torch.stack([torch.linalg.vector_norm(t, dim=1) for t in apart.values()])
    total: Tensor = torch.linalg.vector_norm(by_name, dim=0)
    return total


def difference(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The Euclidean norms of a - b and of b, over all their tensors: (), ()."""
    apart = torch.stack([(a[name] - value).norm() for name, value in b.items()]).norm()
    return apart, torch.stack([value.norm() for value in b.values()]).norm()


def detach(tree: Mapping[str, Tensor]) -> Tree:
    """The same values, cut off from autograd."""
    return {name: t.detach() for name, t in tree.items()}


def to_device(tree: Mapping[str, Tensor], device: torch.device) -> Tree:
    """The same values on `device`."""
    return {name: t.to(device) for name, t in tree.items()}
