"""The base of every fomal datamodule: an endless, seeded stream of meta-batches and fixed evaluation tasks."""

from __future__ import annotations

import signal
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from copy import copy
from functools import partial
from typing import Any, ClassVar, overload

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from fomal.tasks.episode import Episode, Numbers, refuse_others
from fomal.tasks.philox import LARGEST_SEED
from fomal.tasks.sampler import SPLITS
from fomal.utils.checks import countable, fits_memory, one_of, positive

_WORKERS = 1024  # processes


class EpisodeStream(IterableDataset[Episode | Numbers]):
    """Meta-batches `start`, `start + 1`, ... of a split, as far as `stop` (None: endless).

    Meta-batch m of size B holds the episodes m B .. (m + 1) B - 1, of which rank r of w takes every w-th;
    loader worker j of J yields meta-batches start + j, start + j + J, ...; the loader puts them in order.
    """

    def __init__(
        self,
        data: EpisodeDataModule,
        split: str,
        batch: int,
        start: int = 0,
        tasks: int | None = None,
    ) -> None:
        self.data, self.split, self.batch, self.start, self.tasks = data, split, batch, start, tasks
        self.rank, self.world = data.rank_and_world()

    def __len__(self) -> int:
        """The number of meta-batches of which this rank has a part.

        Raises:
            TypeError: the stream is endless.
        """
        if self.tasks is None:
            raise TypeError("the stream is endless")
        first = self.start * self.batch
        first += (self.rank - first) % self.world  # of this rank's episodes
        if first >= self.tasks:
            return 1  # Lightning refuses a loader without batches, and this rank must take part all the same
        if self.world >= self.batch:  # one episode in each batch that it has a part of
            return len(range(first, self.tasks, self.world))
        last = self.tasks - 1 - (self.tasks - 1 - self.rank) % self.world
        return last // self.batch - first // self.batch + 1

    def __getstate__(self) -> dict[str, Any]:
        """Without the trainer, which stays in its process: loader workers that are spawned get a copy of the data."""
        data = copy(self.data)
        data.trainer = None
        return vars(self) | {"data": data}

    def __iter__(self) -> Iterator[Episode | Numbers]:
        worker = get_worker_info()
        offset, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        batch = self.start + offset
        while self.tasks is None or batch * self.batch < self.tasks:
            number = self.numbers(batch)
            if len(number):
                yield self.data.batch(self.split, number)
            batch += stride

    def numbers(self, batch: int) -> Tensor:
        """The episodes of a meta-batch that this rank takes."""
        number = torch.arange(batch * self.batch, (batch + 1) * self.batch)
        if self.tasks is not None:
            number = number[number < self.tasks]
        return number[number % self.world == self.rank]


class EpisodeLoader:
    """Batches of episodes; each pass over them begins where the run is by then.

    Lightning begins a pass at each epoch. A `torch.utils.data.DataLoader` is made for each.

    Args:
        make: makes the torch loader of a pass.
        length: the number of batches; None: endless.
    """

    def __init__(self, make: Callable[[], DataLoader[Any]], length: int | None = None) -> None:
        self.make, self.length = make, length

    def __iter__(self) -> Iterator[Any]:
        return iter(self.make())

    def __len__(self) -> int:
        """The number of batches; raises TypeError for an endless stream."""
        if self.length is None:
            raise TypeError("the stream is endless")
        return self.length

    def state_dict(self) -> dict[str, Any]:
        """Nothing: where the run is follows from its meta-iteration. Lightning goes on with loaders that have this."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See `state_dict`."""


class EpisodeDataModule(L.LightningDataModule):
    """Streams few-shot tasks; a dataset says in `episodes` what episode number i of a split is.

    Args:
        shots: support examples per class in validation, test and prediction tasks.
        query_shots: query examples per class in validation, test and prediction tasks.
        train_shots: support examples per class in training tasks; None means as `shots`.
        train_query_shots: query examples per class in training tasks, for rules that need a query set.
        meta_batch_size: training tasks per meta-iteration, over all processes together.
        val_tasks: number of validation tasks.
        test_tasks: number of test tasks.
        eval_tasks_per_batch: evaluation tasks adapted at once; bounds memory, results do not depend on it;
            more than a few pay on a GPU alone.
        num_workers: loader processes; 0 samples in the training process.
        seed: seed of the episode stream; the command line links it to `seed_everything`.
        on_device: sample training tasks on the device, where their images then stay; they are the same. Needs room for
            the training images there, and `num_workers: 0`.

    Attributes:
        samples_anywhere: whether `episodes` computes on the device of the numbers, without waiting for it.
        keeps_numbers: whether `on_after_batch_transfer` leaves `Numbers` as they are, for a learner that samples them.
        partition_settings: names of the arguments that decide which classes are trained on; a checkpoint is not
            tested under other values of them.
    """

    partition_settings: ClassVar[frozenset[str]] = frozenset()
    samples_anywhere: ClassVar[bool] = False
    allow_zero_length_dataloader_with_multiple_devices = True  # a process may have no evaluation task
    keeps_numbers: bool = False

    def __init__(
        self,
        shots: int = 1,
        query_shots: int = 1,
        train_shots: int | None = None,
        train_query_shots: int = 0,
        meta_batch_size: int = 5,
        val_tasks: int = 200,
        test_tasks: int = 1000,
        eval_tasks_per_batch: int = 10,
        num_workers: int = 0,
        seed: int = 0,
        on_device: bool = False,
    ) -> None:
        super().__init__()
        train_shots = shots if train_shots is None else train_shots
        positive(
            shots=shots,
            query_shots=query_shots,
            train_shots=train_shots,
            meta_batch_size=meta_batch_size,
            val_tasks=val_tasks,
            test_tasks=test_tasks,
            eval_tasks_per_batch=eval_tasks_per_batch,
        )
        countable(train_query_shots=train_query_shots)
        countable(_WORKERS, num_workers=num_workers)
        countable(LARGEST_SEED, seed=seed)
        if on_device and not self.samples_anywhere:
            raise ValueError(f"on_device=True: {type(self).__name__} samples its tasks on the CPU: leave it out.")
        if on_device and num_workers:
            raise ValueError(
                f"num_workers={num_workers} would have nothing to do, since on_device=True samples on the device: "
                f"use num_workers: 0, or leave on_device out."
            )
        self.shots = shots
        self.query_shots = query_shots
        self.train_shots = train_shots
        self.train_query_shots = train_query_shots
        self.meta_batch_size = meta_batch_size
        self.val_tasks = val_tasks
        self.test_tasks = test_tasks
        self.eval_tasks_per_batch = eval_tasks_per_batch
        self.num_workers = num_workers
        self.seed = seed
        self.on_device = on_device

    @abstractmethod
    def episodes(self, split: str, number: Tensor) -> Episode:
        """The tasks `number` (T,) int64 of a split ("train", "val" or "test"): a pure function of its arguments."""

    def batch(self, split: str, number: Tensor) -> Episode | Numbers:
        """The form in which the loader gives the tasks `number`: themselves or, with `on_device`, the numbers alone."""
        if self.on_device and split == "train":
            return Numbers(number, self.seed, split_index(split))
        found = self.episodes(split, number)
        for episode in [found] if isinstance(found, Episode) else found:  # those of replicas are several
            refuse_others(episode)
        return found

    def sample(self, numbers: Numbers) -> Episode:
        """The tasks of these numbers on their device, preprocessed."""
        return self.preprocessed(self.episodes(SPLITS[numbers.split], numbers.number))

    def preprocessed(self, episode: Episode) -> Episode:
        """With the network's inputs."""
        return episode._replace(support_x=self.preprocess(episode.support_x), query_x=self.preprocess(episode.query_x))

    def preprocess(self, x: Tensor) -> Tensor:
        """Turn stored inputs into the network's floating-point inputs; runs on the device."""
        return x

    def examples(self, split: str) -> tuple[int, int]:
        """Support and query examples per class of a split's tasks."""
        return (self.train_shots, self.train_query_shots) if split == "train" else (self.shots, self.query_shots)

    def network_sizes(self) -> dict[str, Any]:
        """The sizes that a network must have, by the names that networks have for them, as far as the data say.

        Returns:
            ways and out_features, the number of outputs; of images in_channels, image_size, in pixels, (H, W) where
            they are not square, and in_features, the number of values.
        """
        ways, form = getattr(self, "ways", None), getattr(self, "image_format", None)
        sizes: dict[str, Any] = {} if ways is None else {"ways": ways, "out_features": ways}
        return sizes if form is None else sizes | image_sizes(form.channels, form.height, form.width)

    def rank_and_world(self) -> tuple[int, int]:
        """This process's rank and the number of processes; (0, 1) without a trainer."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def check_processes(self, world: int) -> None:
        """Raise ValueError, with the nearest sizes that do, where a meta-batch does not divide over the processes."""
        if self.meta_batch_size % world:
            below = self.meta_batch_size // world * world
            nearest = " or ".join(str(size) for size in (below, below + world) if size)
            raise ValueError(
                f"data.meta_batch_size={self.meta_batch_size} does not divide over {world} processes: use {nearest}, "
                f"or another number of devices."
            )

    def check_memory(self, splits: Iterable[str]) -> None:
        """Raise ValueError where the tasks of these splits that are sampled at once do not fit the machine's memory."""
        for split in splits:
            names = ("shots", "query_shots", "eval_tasks_per_batch")
            if split == "train":
                names = ("train_shots", "train_query_shots", "meta_batch_size")
            sizes = {f"data.{name}": getattr(self, name) for name in names}
            support, query, tasks = sizes.values()
            known = self.network_sizes()
            if "ways" in known:
                sizes = {"data.ways": known["ways"]} | sizes
            values = tasks * known.get("ways", 1) * (support + query) * known.get("in_features", 1)
            fits_memory(f"a batch of the {split} split", values, 4, **sizes)

    def train_dataloader(self) -> EpisodeLoader:
        """Endless; each pass begins at the trainer's present meta-iteration, so that resuming equals not stopping.

        Yields an Episode for each meta-iteration. With the trainer's `overfit_batches` each epoch has the same
        meta-batches.
        """
        self.check_processes(self.rank_and_world()[1])
        return EpisodeLoader(self._training_pass)

    def _training_pass(self) -> DataLoader[Any]:
        start = self.trainer.global_step if self.trainer else 0
        repeated = int(getattr(self.trainer, "overfit_batches", 0))
        return self._loader(EpisodeStream(self, "train", self.meta_batch_size, start % repeated if repeated else start))

    def val_dataloader(self) -> EpisodeLoader:
        """The first `val_tasks` tasks of the validation stream."""
        return self._evaluation("val", self.val_tasks)

    def test_dataloader(self) -> EpisodeLoader:
        """The first `test_tasks` tasks of the test stream."""
        return self._evaluation("test", self.test_tasks)

    def predict_dataloader(self) -> EpisodeLoader:
        """The same tasks as `test_dataloader`."""
        return self.test_dataloader()

    @overload
    def on_after_batch_transfer(self, batch: Episode, dataloader_idx: int) -> Episode: ...
    @overload
    def on_after_batch_transfer(self, batch: Numbers, dataloader_idx: int) -> Episode | Numbers: ...
    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Sample and preprocess on the device."""
        if isinstance(batch, Episode):
            return self.preprocessed(batch)
        return batch if self.keeps_numbers else self.sample(batch)

    def _evaluation(self, split: str, tasks: int) -> EpisodeLoader:
        stream = EpisodeStream(self, split, self.eval_tasks_per_batch, tasks=tasks)
        return EpisodeLoader(partial(self._loader, stream), len(stream))

    def _loader(self, stream: EpisodeStream) -> DataLoader[Any]:
        return DataLoader(
            stream,
            batch_size=None,
            num_workers=self.num_workers,
            persistent_workers=False,
            collate_fn=_as_it_is,  # the default makes lists of tuples
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=_leave_signals_to_the_parent,
        )


def _as_it_is(batch: Any) -> Any:
    return batch


def _leave_signals_to_the_parent(worker: int) -> None:
    """Signals to a whole process group reach loader processes too, before the last meta-iteration has its data."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def image_sizes(channels: int, height: int, width: int) -> dict[str, Any]:
    """The sizes of images as `EpisodeDataModule.network_sizes` names them."""
    size = height if height == width else (height, width)
    return {"in_channels": channels, "image_size": size, "in_features": channels * height * width}


def split_index(split: str) -> int:
    """The place of `split` in `SPLITS`; ValueError for an unknown name."""
    one_of(SPLITS, split=split)
    return SPLITS.index(split)
