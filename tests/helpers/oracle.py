"""The ordinary way to write it: a loop over tasks, a deep copy of the network, `torch.optim`."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F


def loss_of(network, x, y):
    output = network(x)
    return F.mse_loss(output, y) if y.is_floating_point() else F.cross_entropy(output, y)


def adapt_one(network, make_optimizer, xs, ys, state=None):
    """Adapt a copy of `network` on mini-batches; return it, the displacement of each step, and the optimiser."""
    network = copy.deepcopy(network)
    optimizer = make_optimizer(network.parameters())
    if state is not None:
        optimizer.load_state_dict(copy.deepcopy(state))
    displacements = []
    for x, y in zip(xs, ys, strict=True):
        before = [p.detach().clone() for p in network.parameters()]
        optimizer.zero_grad()
        loss_of(network, x, y).backward()
        optimizer.step()
        displacements.append([p.detach() - b for p, b in zip(network.parameters(), before, strict=True)])
    return network, displacements, optimizer


def batches(episode, plan, task):
    """The mini-batches of one task."""
    return [episode.support_x[task][i[task]] for i in plan], [episode.support_y[task][i[task]] for i in plan]


def gradient_of(network, x, y):
    return torch.autograd.grad(loss_of(network, x, y), list(network.parameters()))
