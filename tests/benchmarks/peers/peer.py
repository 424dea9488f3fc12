"""What a peer is."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from importlib import metadata
from typing import Any, ClassVar

import torch
from torch import Tensor

from fomal.tasks.episode import Episode
from tests.benchmarks.works import Work
from tests.helpers import oracle


class Peer(ABC):
    """Another way to do the same work.

    Attributes:
        name: as on the command line.
        package: what must be installed; None: nothing beyond fomal's own dependencies.
        optimizers: the inner optimiser of each kind of work that the peer does, "adam" (beta1 = 0) or "sgd"; both
            sides of the pair use it. Adam is the released Reptile code's. MAML has SGD, as Finn et al.: to be
            differentiable, Adam needs a constant under the root, which fomal adds before the correction of the bias,
            TorchOpt after it, and `higher` not at all.
    """

    name: str
    package: str | None = None
    optimizers: ClassVar[dict[str, str]]

    def available(self, device: str) -> str | None:
        """Why the peer cannot be used here; None where it can."""
        if self.package is None:
            return None
        try:
            self.imported()
        except ImportError as error:
            return f"not installed ({error})"
        except Exception as error:  # an old package may fail in any way beside a new torch
            return f"does not import ({type(error).__name__}: {error})"
        return None

    def imported(self) -> Any:
        """The package, imported only here because that takes seconds."""
        return importlib.import_module(str(self.package))

    def version(self) -> str:
        """The version of the package."""
        return metadata.version(self.package or "torch")

    @abstractmethod
    def prepare(self, work: Work, kind: str) -> Callable[[], dict[str, Tensor]]:
        """Make ready what need not be timed, and return what is.

        Returns:
            A function of nothing that runs the inner loops of one meta-batch and returns the outer gradient, by the
            network's names; of "evaluation", the logits `alone` and `together`; of "fit", the distance from the last
            weights to the first.
        """


def batches(episode: Episode, indices: tuple[Tensor, ...], task: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The mini-batches of one task, one after the other."""
    return zip(*oracle.batches(episode, indices, task), strict=True)


def protocols(network: Callable[[Tensor], Tensor], episode: Episode, task: int) -> tuple[Tensor, Tensor]:
    """Logits (Q, ways) of a task's queries: each with the support set and nothing else, and all together."""
    support, queries = episode.support_x[task], episode.query_x[task]
    alone = torch.stack([network(torch.cat([support, query[None]]))[-1] for query in queries])
    return alone, network(queries)
