"""The learners of a run: one, or those of replicas."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import lightning as L

from fomal.learner.meta_learner import MetaLearner
from fomal.learner.replicas import Replicas, replica_folder
from fomal.tasks.datamodule import EpisodeDataModule
from fomal.tasks.replicated import ReplicatedDataModule


class Part(NamedTuple):
    """A learner of a run.

    Attributes:
        learner: the learner.
        data: its tasks.
        folder: where its files belong.
        prefix: what the names of its figures in a logger begin with.
    """

    learner: MetaLearner
    data: EpisodeDataModule
    folder: Path
    prefix: str


def parts_of(module: L.LightningModule, data: object, folder: Path) -> Iterator[Part]:
    """The learners of the run in `folder`; none where module or data are of another kind."""
    if isinstance(module, Replicas) and isinstance(data, ReplicatedDataModule):
        for place, learner in module.running():
            own = replica_folder(place)
            yield Part(learner, data.parts[place], folder / own, f"{own}/")
    elif isinstance(module, MetaLearner) and isinstance(data, EpisodeDataModule):
        yield Part(module, data, folder, "")
