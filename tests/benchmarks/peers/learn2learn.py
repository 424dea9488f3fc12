"""learn2learn: `MAML`, cloned for each task; leaves the mean over tasks to its user."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from tests.benchmarks.peers.peer import Peer, batches, protocols
from tests.benchmarks.works import Work
from tests.helpers.oracle import loss_of


class Learn2Learn(Peer):
    """Its inner loop is SGD."""

    name = package = "learn2learn"
    optimizers: ClassVar[dict[str, str]] = {"query_fomaml": "sgd", "maml": "sgd", "evaluation": "sgd"}

    def prepare(self, work: Work, kind: str) -> Callable[[], dict[str, Tensor]]:
        """See `Peer`."""
        episode = work.episode(kind)
        indices = work.indices(kind, episode)
        algorithm = self.imported().algorithms.MAML(work.network(), lr=work.sgd_lr, first_order=kind != "maml")

        def outer_gradient() -> dict[str, Tensor]:
            algorithm.zero_grad()
            for t in range(episode.tasks):
                learner = algorithm.clone()
                for x, y in batches(episode, indices, t):
                    learner.adapt(loss_of(learner, x, y))
                (loss_of(learner, episode.query_x[t], episode.query_y[t]) / episode.tasks).backward()
            return {name: p.grad for name, p in algorithm.module.named_parameters()}

        def evaluate() -> dict[str, Tensor]:
            logits = []
            for t in range(episode.tasks):
                learner = algorithm.clone()
                for x, y in batches(episode, indices, t):
                    learner.adapt(loss_of(learner, x, y))
                with torch.no_grad():
                    logits.append(protocols(learner, episode, t))
            alone, together = zip(*logits, strict=True)
            return {"alone": torch.stack(alone), "together": torch.stack(together)}

        return evaluate if kind == "evaluation" else outer_gradient
