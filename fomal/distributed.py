"""Averages over processes."""

from __future__ import annotations

import torch
import torch.distributed as dist

from fomal.tree import Tree


def average_over_processes(trees: list[Tree]) -> list[Tree]:
    """The mean of each tensor over all processes, in one all-reduce of one flat vector.

    Outer gradients are set by hand, so the hooks of DistributedDataParallel never see them.

    Args:
        trees: floating-point tensors of one dtype and device; the same names and shapes in every process.

    Returns:
        The averaged trees; the same objects where there is only one process.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return trees
    tensors = [t for values in trees for t in values.values()]
    flat = torch.cat([t.flatten() for t in tensors])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    parts = iter(torch.split(flat, [t.numel() for t in tensors]))
    return [{name: next(parts).view_as(t) for name, t in values.items()} for values in trees]
