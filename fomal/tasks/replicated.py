"""The same data for several runs side by side, each with tasks of its own."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import Any

from torch import Tensor

from fomal.tasks.datamodule import EpisodeDataModule
from fomal.tasks.philox import LARGEST_SEED
from fomal.utils.checks import countable


class ReplicatedDataModule(EpisodeDataModule):
    """Streams a tuple of R meta-batches: those that `data` would stream with each of R seeds. It is loaded once.

    Args:
        data: any datamodule of episodes.
        seeds: of the R streams.

    Raises:
        ValueError: there is no seed, a negative one, or `data` samples its tasks on the device.
    """

    def __init__(self, data: EpisodeDataModule, seeds: Sequence[int]) -> None:
        if not seeds:
            raise ValueError("seeds is empty: give one for each replica.")
        for seed in seeds:
            countable(LARGEST_SEED, seed=seed)
        if data.on_device:
            raise ValueError("data.on_device=True does not work with replicas yet: leave one of the two out.")
        super().__init__(
            data.shots,
            data.query_shots,
            data.train_shots,
            data.train_query_shots,
            data.meta_batch_size,
            data.val_tasks,
            data.test_tasks,
            data.eval_tasks_per_batch,
            data.num_workers,
            seeds[0],
        )
        self.prepare_data_per_node = data.prepare_data_per_node
        self.data, self.seeds = data, list(seeds)
        self.parts = self._split()

    def _split(self) -> list[EpisodeDataModule]:
        parts = [copy(self.data) for _ in self.seeds]
        for part, seed in zip(parts, self.seeds, strict=True):
            part.seed = seed
        return parts

    def prepare_data(self) -> None:
        """As the data do."""
        self.data.prepare_data()

    def setup(self, stage: str) -> None:
        """Load the data, once for all."""
        self.data.setup(stage)
        self.parts = self._split()

    def teardown(self, stage: str) -> None:
        """As the data do."""
        self.data.teardown(stage)

    def episodes(self, split: str, number: Tensor) -> Any:
        """A tuple of R Episodes with the tasks `number` of each stream."""
        return tuple(part.episodes(split, number) for part in self.parts)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Preprocess on the device."""
        return tuple(self.data.on_after_batch_transfer(part, dataloader_idx) for part in batch)
