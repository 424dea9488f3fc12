"""Tasks sampled by learn2learn 0.2.0 (Arnold et al. 2020, arXiv:2008.12284), or by any other sampler, as episodes."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, Literal
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torchvision.datasets import Omniglot, omniglot
from torchvision.datasets.utils import check_integrity

from fomal.tasks.datamodule import EpisodeDataModule, image_sizes, split_index
from fomal.tasks.episode import Episode
from fomal.tasks.philox import LARGEST_SEED
from fomal.tasks.sampler import SPLITS, task_words
from fomal.utils.checks import countable, one_of, positive, several
from fomal.utils.output import rank_zero_info

# What learn2learn reads below root, and what it fetches if something of it is missing.
BENCHMARKS = {
    "omniglot": (
        [f"omniglot-py/images_{part}{end}" for part in ("background", "evaluation") for end in (".zip", "")],
        "two zips (14 MB) from GitHub into omniglot-py/",
    ),
    "mini-imagenet": (
        [f"mini-imagenet-cache-{split}.pkl" for split in ("train", "validation", "test")],
        "three pickles (1.3 GB) from Dropbox, else Google Drive",
    ),
    "tiered-imagenet": (
        [f"tiered-imagenet/{s}_{what}.pkl" for s in ("train", "val", "test") for what in ("images_png", "labels")],
        "pickles (12 GB) from Zenodo, else Google Drive, into tiered-imagenet/",
    ),
    "fc100": (
        [f"FC100_{split}.pickle" for split in ("train", "val", "test")],
        "a zip of pickles (160 MB) from Zenodo, else Google Drive, else Dropbox",
    ),
    "cifarfs": (["cifarfs"], "a zip of CIFAR-100's images from Zenodo, else Google Drive, into cifarfs/"),
}

_IMAGES = {  # channels, height and width
    **dict.fromkeys(("mini-imagenet", "tiered-imagenet"), (3, 84, 84)),
    **dict.fromkeys(("fc100", "cifarfs"), (3, 32, 32)),
    "omniglot": (1, 28, 28),
}


class TasksetDataModule(EpisodeDataModule):
    """N-way K-shot tasks as learn2learn samples them: one of its benchmarks, or tasksets made in Python.

    Episode i of a split is what the split's taskset gives right after the generators of Python, numpy and torch (CPU)
    were seeded from (seed, split, i); a taskset of n tasks gives task i mod n. learn2learn's cache of task
    descriptions is emptied each time, since what it holds depends on the order of access.

    In a task, the w-th smallest label becomes label w. The first `shots` examples of each class, in the taskset's
    order, are its support, the next `query_shots` its query; any others are left out.

    A benchmark's inputs are float32 in [0, 1]; of Omniglot, 28 x 28 with ink 1. Its training, validation and test
    classes are apart: learn2learn itself samples Omniglot's tasks of every split from all 1623 characters, which is put
    right here. It turns all images of an Omniglot task by the same random quarter turns, in every split. Mini-ImageNet
    takes 6 GB of memory per process. After `setup`, `tasksets` holds each split's.

    Args:
        benchmark: the name of a benchmark of learn2learn, which the extra `learn2learn` installs.
        root: the benchmark's folder, in learn2learn's layout. learn2learn writes an index of the classes into it, and
            trusts its pickles, which can run any code as they are read.
        download: let learn2learn fetch what `root` lacks: for Omniglot two zips (14 MB) from GitHub, for mini-ImageNet
            three pickles (1.3 GB) from Dropbox or Google Drive, for the others archives or pickles from Zenodo, Google
            Drive or Dropbox (tiered-ImageNet 12 GB, FC100 160 MB). Its links are of 2023 and may be dead.
        num_tasks: how many different tasks each split of a benchmark has; None samples new ones without end.
        partition_seed: seed of the random choice of the benchmark Omniglot's 1100 training, 100 validation and 423
            test characters; the other benchmarks have theirs fixed.
        tasksets: instead of a benchmark, in Python: for "train", "val" and "test", as far as they are used, a
            learn2learn `Taskset`, or anything with `__getitem__` and `__len__` (a fixed number of tasks) or with
            `sample()`, that gives tasks (x (n, *input), y (n,)). It may be random by the generators named above only.
        ways: classes per task.
        kwargs: see `EpisodeDataModule`.

    Raises:
        ValueError: neither or both of `benchmark` and `tasksets`.
    """

    partition_settings = frozenset({"benchmark", "partition_seed"})

    def __init__(
        self,
        benchmark: Literal["omniglot", "mini-imagenet", "tiered-imagenet", "fc100", "cifarfs"] | None = None,
        root: str = "data/learn2learn",
        download: bool = False,
        num_tasks: int | None = None,
        partition_seed: int = 0,
        tasksets: dict[str, Any] | None = None,
        ways: int = 5,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        several(ways=ways)
        countable(LARGEST_SEED, partition_seed=partition_seed)
        if num_tasks is not None:
            positive(num_tasks=num_tasks)
        if benchmark is not None:
            one_of(BENCHMARKS, benchmark=benchmark)
        if (benchmark is None) == (not tasksets):
            raise ValueError(
                f"benchmark={benchmark} {'beside' if tasksets else 'without'} tasksets: give either benchmark, one of "
                f"{', '.join(BENCHMARKS)}, or, in Python, tasksets."
            )
        for split, taskset in (tasksets or {}).items():
            one_of(SPLITS, split=split)
            if not hasattr(taskset, "sample") and not (hasattr(taskset, "__getitem__") and hasattr(taskset, "__len__")):
                raise TypeError(
                    f"tasksets[{split!r}] is a {type(taskset).__name__}: give a learn2learn Taskset, or an object with "
                    f"__getitem__ and __len__, or with sample(), that gives tasks (x, y)."
                )
        self.benchmark = benchmark
        self.root = root
        self.download = download
        self.num_tasks = num_tasks
        self.partition_seed = partition_seed
        self.tasksets = dict(tasksets or {})
        self.ways = ways

    def network_sizes(self) -> dict[str, Any]:
        """As `EpisodeDataModule.network_sizes`; of tasksets made in Python the ways alone."""
        sizes = super().network_sizes()
        return sizes if self.benchmark is None else sizes | image_sizes(*_IMAGES[self.benchmark])

    def prepare_data(self) -> None:
        """Load the benchmark, so that one process per machine downloads it and writes learn2learn's index."""
        self._load()

    def setup(self, stage: str | None = None) -> None:
        """Load all splits, whatever the `stage`, and try a task of each; cheap when they are loaded already."""
        self._load()
        for split in self.tasksets:
            self.episodes(split, torch.zeros(1, dtype=torch.int64))

    def episodes(self, split: str, number: Tensor) -> Episode:
        """Tasks `number` (T,) int64 of a split, inputs as the taskset gives them, on the CPU.

        Raises:
            ValueError: there is no taskset for the split, or its task has too few classes or examples.
        """
        place = split_index(split)
        shots, _ = self.examples(split)
        if split not in self.tasksets:
            remedy = "call setup() first" if self.benchmark else f"give tasksets[{split!r}]"
            raise ValueError(f"there is no taskset for the {split} split: {remedy}.")
        x = torch.stack([self._task(split, i) for i in number.tolist()])  # (T, W, K + Q, *input)
        return Episode.of_classes(x[:, :, :shots], x[:, :, shots:], number, self.seed, place)

    def _load(self) -> None:
        if self.benchmark is None or self.tasksets:
            return
        self.tasksets = load_benchmark(
            self.benchmark,
            self.root,
            self.download,
            self.partition_seed,
            train_ways=self.ways,
            train_samples=sum(self.examples("train")),
            test_ways=self.ways,  # of validation tasks too, and so the samples
            test_samples=sum(self.examples("test")),
            num_tasks=self.num_tasks or -1,
        )

    def _task(self, split: str, number: int) -> Tensor:
        """One task, class by class: (ways, shots + query shots, *input)."""
        examples = self.examples(split)
        names = ("train_shots", "train_query_shots") if split == "train" else ("shots", "query_shots")
        wanted = f"ways={self.ways} classes, {names[0]}={examples[0]} plus {names[1]}={examples[1]} examples of each"
        try:
            x, y = sample_task(self.tasksets[split], self.seed, SPLITS.index(split), number)
            return arrange(x, y, self.ways, sum(examples))
        except ValueError as error:  # also those of random.sample, on which learn2learn's transforms rest
            raise ValueError(
                f"task {number} of the {split} taskset cannot be used ({error}): it needs {wanted}; "
                f"change these settings, or what the taskset samples."
            ) from error


def sample_task(taskset: Any, seed: int, split: int, number: int) -> tuple[Tensor, Tensor]:
    """Task `number` of a taskset, as it gives it: x (n, *input), y (n,); a pure function of the arguments."""
    endless = not hasattr(taskset, "__len__") or getattr(taskset, "num_tasks", None) == -1
    if not endless:
        number %= len(taskset)
    with seeded(task_words(seed, split, torch.tensor([number]), 6)[0].tolist()):
        if endless:
            x, y = taskset.sample()
        else:
            getattr(taskset, "sampled_descriptions", {}).clear()
            x, y = taskset[number]
    return torch.as_tensor(x).cpu(), torch.as_tensor(y).cpu()


def arrange(x: Tensor, y: Tensor, ways: int, examples: int) -> Tensor:
    """Sort a task by class: the first `examples` of each, in their order, (ways, examples, *input).

    Args:
        x: (n, *input).
        y: (n,) labels, any `ways` different values.
        ways: classes that the task must have.
        examples: examples of each class to keep.

    Raises:
        ValueError: the task has another number of classes, or too few examples of one.
    """
    if y.ndim != 1 or len(x) != len(y):
        raise ValueError(f"x has shape {tuple(x.shape)}, y {tuple(y.shape)} rather than (n, ...) and (n,)")
    labels, which, counts = torch.unique(y, return_inverse=True, return_counts=True)  # labels ascend
    if len(labels) != ways:
        raise ValueError(f"it has {len(labels)} classes")
    if int(counts.min()) < examples:
        raise ValueError(f"label {labels[counts.argmin()].item()} has {int(counts.min())} examples")
    first = counts.cumsum(0) - counts
    chosen = which.argsort(stable=True)[first[:, None] + torch.arange(examples)]  # (ways, examples)
    return x[chosen]


@contextmanager
def seeded(words: list[int]) -> Iterator[None]:
    """Inside, the generators of Python, numpy and torch (CPU) start from six 32-bit words; then they are as before."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002 - others sample from it
    try:
        random.seed(words[0] << 32 | words[1])
        np.random.seed(words[2:4])  # noqa: NPY002
        torch.default_generator.manual_seed(words[4] << 32 | words[5])  # torch.manual_seed would reach CUDA's too
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])  # noqa: NPY002
        torch.set_rng_state(before[2])


def load_benchmark(name: str, root: str, download: bool, partition_seed: int, **sizes: int) -> dict[str, Any]:
    """learn2learn's tasksets of a benchmark, by split; `sizes` are arguments of its `get_tasksets`.

    Raises:
        ModuleNotFoundError: learn2learn is not installed.
        FileNotFoundError: `root` lacks something, and `download` is off.
        RuntimeError: learn2learn could not fetch or read it.
    """
    learn2learn = _import_learn2learn(name)
    folder, (paths, source) = Path(root).expanduser(), BENCHMARKS[name]
    lacking = [path for path in paths if not _is_there(folder / path)]
    if lacking and not download:
        raise FileNotFoundError(
            f"root={root!r} lacks {', '.join(lacking)} of learn2learn's benchmark={name!r}: set data.root to a folder "
            f"with it, or data.download: true ({source}), or use fomal's own datamodule of this data set."
        )
    if lacking:
        rank_zero_info(f"learn2learn fetches {name} into {root}: {source}.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        words = task_words(partition_seed, len(SPLITS), torch.zeros(1, dtype=torch.int64), 6)[0]
        with seeded(words.tolist()), _sorted_folders():  # learn2learn shuffles Omniglot's characters
            train, val, test = learn2learn.vision.benchmarks.get_tasksets(
                name, root=str(folder), data_augmentation="normalize", **sizes
            )
    except Exception as error:  # whatever networks, archives and pickles raise
        raise RuntimeError(
            f"learn2learn could not load benchmark={name!r} from root={root!r} with download={download} "
            f"({type(error).__name__}: {error}): its links may be dead ({source}). Delete damaged files, put "
            f"{', '.join(paths)} there, or use fomal's own datamodule of this data set."
        ) from error
    tasksets = {"train": train, "val": val, "test": test}
    for taskset in tasksets.values():
        for transform in taskset.task_transforms:
            if hasattr(transform, "filter_labels"):  # Omniglot's has those of all splits
                transform.filter_labels = list(taskset.dataset.labels)
    return tasksets


def _import_learn2learn(name: str) -> ModuleType:
    try:
        import learn2learn  # takes seconds
    except ImportError as error:
        raise ModuleNotFoundError(
            f"benchmark={name!r} needs learn2learn, which cannot be imported ({error}): use "
            f"`pip install fomal[learn2learn]`, or `uv sync --extra learn2learn` in a checkout, which makes it compile."
        ) from error
    return learn2learn  # type: ignore[no-any-return]


def _is_there(path: Path) -> bool:
    """As torchvision sees it: it fetches a zip of Omniglot again unless its MD5 is right."""
    return path.is_dir() or check_integrity(path, Omniglot.zips_md5.get(path.stem) if path.suffix == ".zip" else None)


@contextmanager
def _sorted_folders() -> Iterator[None]:
    """Let torchvision list Omniglot in alphabetical order, so that its split does not depend on the file system."""

    def in_order(function: Callable[..., list[str]]) -> Callable[..., list[str]]:
        return lambda *args: sorted(function(*args))

    with (
        mock.patch.object(omniglot, "list_dir", in_order(omniglot.list_dir)),
        mock.patch.object(omniglot, "list_files", in_order(omniglot.list_files)),
    ):
        yield
