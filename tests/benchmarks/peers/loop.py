"""The ordinary way: a loop over tasks, a deep copy of the network, `torch.optim`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from fomal.tasks.episode import Episode
from fomal.tasks.sampler import MinibatchIndices
from tests.benchmarks.peers.peer import Peer, batches, protocols
from tests.benchmarks.works import Work
from tests.helpers.oracle import loss_of


class Loop(Peer):
    """A plain Python loop; MAML through `torch.autograd`."""

    name = "loop"
    optimizers: ClassVar[dict[str, str]] = {
        "reptile": "adam",
        "fomaml": "adam",
        "query_fomaml": "adam",
        "maml": "sgd",
        "evaluation": "adam",
        "fit": "adam",
    }

    def prepare(self, work: Work, kind: str) -> Callable[[], dict[str, Tensor]]:
        """See `Peer`."""
        if kind == "fit":
            return lambda: fit(work)
        network, episode = work.network(), work.episode(kind)
        indices = work.indices(kind, episode)
        if kind == "maml":
            return lambda: maml(network, episode, indices, work.sgd_lr)
        if kind == "evaluation":
            return lambda: evaluate(network, episode, indices, work.adam_lr)
        return partial(UPDATES[kind], network, episode, indices, work.adam_lr)


def copied(network: nn.Module, lr: float) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A copy of the network, and an optimiser for it."""
    copy_of = copy.deepcopy(network)
    return copy_of, torch.optim.Adam(copy_of.parameters(), lr=lr, betas=(0.0, 0.999))


def step(network: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    optimizer.zero_grad()
    loss_of(network, x, y).backward()
    optimizer.step()


def reptile(network: nn.Module, episode: Episode, indices: MinibatchIndices, lr: float) -> dict[str, Tensor]:
    mean = {name: torch.zeros_like(p) for name, p in network.named_parameters()}
    for t in range(episode.tasks):
        adapted, optimizer = copied(network, lr)
        for x, y in batches(episode, indices, t):
            step(adapted, optimizer, x, y)
        for name, p in adapted.named_parameters():
            mean[name] += p.detach() / episode.tasks
    return {name: p.detach() - mean[name] for name, p in network.named_parameters()}


def fomaml(network: nn.Module, episode: Episode, indices: MinibatchIndices, lr: float) -> dict[str, Tensor]:
    mean = {name: torch.zeros_like(p) for name, p in network.named_parameters()}
    for t in range(episode.tasks):
        adapted, optimizer = copied(network, lr)
        for number, (x, y) in enumerate(batches(episode, indices, t), 1):
            if number == len(indices):
                before = [p.detach().clone() for p in adapted.parameters()]
            step(adapted, optimizer, x, y)
        for (name, p), b in zip(adapted.named_parameters(), before, strict=True):
            mean[name] += (b - p.detach()) / episode.tasks
    return mean


def query_fomaml(network: nn.Module, episode: Episode, indices: MinibatchIndices, lr: float) -> dict[str, Tensor]:
    mean = {name: torch.zeros_like(p) for name, p in network.named_parameters()}
    for t in range(episode.tasks):
        adapted, optimizer = copied(network, lr)
        for x, y in batches(episode, indices, t):
            step(adapted, optimizer, x, y)
        loss = loss_of(adapted, episode.query_x[t], episode.query_y[t])
        gradients = torch.autograd.grad(loss, list(adapted.parameters()))
        for name, gradient in zip(mean, gradients, strict=True):
            mean[name] += gradient / episode.tasks
    return mean


UPDATES = {"reptile": reptile, "fomaml": fomaml, "query_fomaml": query_fomaml}


def maml(network: nn.Module, episode: Episode, indices: MinibatchIndices, lr: float) -> dict[str, Tensor]:
    phi = dict(network.named_parameters())
    mean = {name: torch.zeros_like(p) for name, p in phi.items()}
    for t in range(episode.tasks):
        adapted = phi
        for x, y in batches(episode, indices, t):
            loss = loss_of(with_weights(network, adapted), x, y)
            gradients = torch.autograd.grad(loss, list(adapted.values()), create_graph=True)
            adapted = {name: p - lr * g for (name, p), g in zip(adapted.items(), gradients, strict=True)}
        loss = loss_of(with_weights(network, adapted), episode.query_x[t], episode.query_y[t])
        for name, gradient in zip(mean, torch.autograd.grad(loss, list(phi.values())), strict=True):
            mean[name] += gradient / episode.tasks
    return mean


def with_weights(network: nn.Module, weights: dict[str, Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.func.functional_call(network, weights, (x,))


def evaluate(network: nn.Module, episode: Episode, indices: MinibatchIndices, lr: float) -> dict[str, Tensor]:
    alone, together = [], []
    for t in range(episode.tasks):
        adapted, optimizer = copied(network, lr)
        for x, y in batches(episode, indices, t):
            step(adapted, optimizer, x, y)
        with torch.no_grad():
            logits = protocols(adapted, episode, t)
        alone.append(logits[0])
        together.append(logits[1])
    return {"alone": torch.stack(alone), "together": torch.stack(together)}


def fit(work: Work) -> dict[str, Tensor]:
    """Reptile with a step size from 1 to 0, on the same stream of tasks."""
    network = work.network()
    start = {name: p.detach().clone() for name, p in network.named_parameters()}
    for number in range(work.fit_iterations):
        tasks = work.data.meta_batch_size
        episode = work.prepared("fit", torch.arange(number * tasks, (number + 1) * tasks))
        gradient = reptile(network, episode, work.indices("fit", episode), work.adam_lr)
        with torch.no_grad():
            for name, p in network.named_parameters():
                p -= (1 - number / work.fit_iterations) * gradient[name]
    return {name: start[name] - p.detach() for name, p in network.named_parameters()}
