"""The ordinary way to write it: a loop over tasks, a deep copy of the network, `torch.optim`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fomal.tasks.episode import Episode


def loss_of(network: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    output = network(x)
    return F.mse_loss(output, y) if y.is_floating_point() else F.cross_entropy(output, y)


def adapt_one(
    network: nn.Module,
    make_optimizer: Callable[..., torch.optim.Optimizer],
    xs: Iterable[Tensor],
    ys: Iterable[Tensor],
    state: Mapping[str, Any] | None = None,
) -> tuple[nn.Module, list[list[Tensor]], torch.optim.Optimizer]:
    """Adapt a copy of `network` on mini-batches; return it, the displacement of each step, and the optimiser."""
    network = copy.deepcopy(network)
    optimizer = make_optimizer(network.parameters())
    if state is not None:
        optimizer.load_state_dict(copy.deepcopy(dict(state)))
    displacements = []
    for x, y in zip(xs, ys, strict=True):
        before = [p.detach().clone() for p in network.parameters()]
        optimizer.zero_grad()
        loss_of(network, x, y).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        displacements.append([p.detach() - b for p, b in zip(network.parameters(), before, strict=True)])
    return network, displacements, optimizer


def batches(episode: Episode, indices: Tensor, task: int) -> tuple[list[Tensor], list[Tensor]]:
    """The mini-batches of one task."""
    return [episode.support_x[task][i[task]] for i in indices], [episode.support_y[task][i[task]] for i in indices]


def gradient_of(network: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss_of(network, x, y), list(network.parameters()))
