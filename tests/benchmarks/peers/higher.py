"""`higher`: `innerloop_ctx` around a torch optimiser, task by task, as in its example of MAML."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from tests.benchmarks.peers.peer import Peer, batches
from tests.benchmarks.works import Work
from tests.helpers.oracle import loss_of


class Higher(Peer):
    """With SGD: its Adam adds epsilon before the bias is corrected, which is another optimiser than torch's."""

    name = package = "higher"
    optimizers: ClassVar[dict[str, str]] = {"query_fomaml": "sgd", "maml": "sgd"}

    def imported(self) -> Any:
        """See `Peer`."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # of its own source
            return super().imported()

    def prepare(self, work: Work, kind: str) -> Callable[[], dict[str, Tensor]]:
        """See `Peer`."""
        innerloop, network, episode = self.imported().innerloop_ctx, work.network(), work.episode(kind)
        indices = work.indices(kind, episode)
        optimizer = torch.optim.SGD(network.parameters(), lr=work.sgd_lr)
        names = [name for name, _ in network.named_parameters()]
        exact = kind == "maml"

        def outer_gradient() -> dict[str, Tensor]:
            mean = {name: torch.zeros_like(p) for name, p in network.named_parameters()}
            for t in range(episode.tasks):
                with innerloop(network, optimizer, None, False, track_higher_grads=exact) as (fast, inner):
                    for x, y in batches(episode, indices, t):
                        inner.step(loss_of(fast, x, y))
                    loss = loss_of(fast, episode.query_x[t], episode.query_y[t])
                    wanted = list(fast.parameters(time=0 if exact else -1))
                    gradients = torch.autograd.grad(loss, wanted)
                for name, gradient in zip(names, gradients, strict=True):
                    mean[name] += gradient / episode.tasks
            return mean

        return outer_gradient
