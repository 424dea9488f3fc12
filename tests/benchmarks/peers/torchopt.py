"""TorchOpt: its functional Adam task by task, and for MAML `MetaSGD` with the network's state put back after each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fomal.tasks.episode import Episode
from fomal.tasks.sampler import MinibatchIndices
from tests.benchmarks.peers.peer import Peer, batches
from tests.benchmarks.works import Work
from tests.helpers.oracle import loss_of


class TorchOpt(Peer):
    """As in its example of MAML, and in its functional one."""

    name = package = "torchopt"
    optimizers: ClassVar[dict[str, str]] = {"query_fomaml": "adam", "maml": "sgd"}

    def prepare(self, work: Work, kind: str) -> Callable[[], dict[str, Tensor]]:
        """See `Peer`."""
        torchopt, network, episode = self.imported(), work.network(), work.episode(kind)
        indices = work.indices(kind, episode)
        if kind == "maml":
            return lambda: maml(torchopt, network, episode, indices, work.sgd_lr)
        return lambda: query_fomaml(torchopt, network, episode, indices, work.adam_lr)


def maml(
    torchopt: Any, network: nn.Module, episode: Episode, indices: MinibatchIndices, lr: float
) -> dict[str, Tensor]:
    phi = dict(network.named_parameters())
    mean = {name: torch.zeros_like(p) for name, p in phi.items()}
    optimizer = torchopt.MetaSGD(network, lr=lr)
    start = [torchopt.extract_state_dict(of, by="reference") for of in (network, optimizer)]
    for t in range(episode.tasks):
        for x, y in batches(episode, indices, t):
            optimizer.step(loss_of(network, x, y))
        loss = loss_of(network, episode.query_x[t], episode.query_y[t])
        for name, gradient in zip(mean, torch.autograd.grad(loss, list(phi.values())), strict=True):
            mean[name] += gradient / episode.tasks
        for of, state in zip((network, optimizer), start, strict=True):
            torchopt.recover_state_dict(of, state)
    return mean


def query_fomaml(
    torchopt: Any, network: nn.Module, episode: Episode, indices: MinibatchIndices, lr: float
) -> dict[str, Tensor]:
    optimizer = torchopt.adam(lr, betas=(0.0, 0.999))

    def loss(weights: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return loss_of(lambda inputs: torch.func.functional_call(network, weights, (inputs,)), x, y)

    phi = {name: p.detach() for name, p in network.named_parameters()}
    mean = {name: torch.zeros_like(p) for name, p in phi.items()}
    for t in range(episode.tasks):
        weights, state = phi, optimizer.init(phi)
        for x, y in batches(episode, indices, t):
            updates, state = optimizer.update(torch.func.grad(loss)(weights, x, y), state, inplace=False)
            weights = torchopt.apply_updates(weights, updates, inplace=False)
        for name, gradient in torch.func.grad(loss)(weights, episode.query_x[t], episode.query_y[t]).items():
            mean[name] += gradient / episode.tasks
    return mean
