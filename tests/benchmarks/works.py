"""The works: networks, random data and settings, the same for fomal and for every peer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn

from fomal.data import SinusoidDataModule
from fomal.data.images.class_images import ClassImages, ImageDataModule
from fomal.data.images.image_format import ImageFormat
from fomal.inner import SGD, Adam
from fomal.inner.optimizer import InnerOptimizer
from fomal.learner.meta_learner import MetaLearner
from fomal.learner.settings import Execution, InnerSchedule
from fomal.models import MLP, Conv4
from fomal.outer import FOMAML, MAML, OuterRule, QueryFOMAML, Reptile
from fomal.tasks.datamodule import EpisodeDataModule
from fomal.tasks.episode import Episode
from fomal.tasks.sampler import MinibatchIndices, minibatch_indices

RULES: dict[str, Callable[[], OuterRule]] = {
    "reptile": Reptile,
    "fomaml": FOMAML,  # the released code's: the last displacement
    "query_fomaml": QueryFOMAML,  # Finn et al.'s: the query gradient
    "maml": MAML,
}
KINDS = (*RULES, "evaluation", "fit")
"""What is run: one meta-iteration of a rule, the evaluation of a batch of tasks, or Reptile's whole training."""

RUN_AS: dict[str, dict[str, bool]] = {
    "plain": {"traced": False},
    "traced": {},
    "compiled": {"compiled": True},
    "captured": {"cuda_graph": True},
}
"""How fomal runs, as settings of its execution; "captured" also has `data.on_device` where tasks are drawn."""

CLASSES = 40


class RandomImages(ImageDataModule):
    """N-way K-shot tasks of noise, uint8 in memory as Omniglot and Mini-ImageNet are."""

    def __init__(self, channels: int, size: int, images: int, **kwargs: int) -> None:
        super().__init__(query_shots=1, **kwargs)
        self.channels, self.images = channels, images
        self.image_format = ImageFormat(size, size, "rgb" if channels == 3 else "gray")

    def load(self) -> dict[str, ClassImages]:
        """The same images in training and test."""
        shape = (CLASSES * self.images, self.channels, self.image_format.height, self.image_format.width)
        x = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        classes = ClassImages.of(x, torch.full((CLASSES,), self.images))
        return {"train": classes, "test": classes}


@dataclass(frozen=True)
class Work:
    """One work.

    Attributes:
        name: as on the command line.
        make_network: the network, as initialised.
        make_data: training and evaluation tasks.
        inner_steps: of training, k.
        inner_batch_size: of training.
        eval_inner_batch_size: of evaluation, which takes `eval_inner_steps`.
        fit_iterations: meta-iterations of a whole training.
        adam_lr: step size of Adam (beta1 = 0).
        sgd_lr: step size of SGD.
        run_as: how fomal runs.
        bf16: whether fomal runs under autocast to bfloat16.
    """

    name: str
    make_network: Callable[[], nn.Module]
    make_data: Callable[[], EpisodeDataModule]
    inner_steps: int
    inner_batch_size: int
    eval_inner_batch_size: int
    fit_iterations: int
    adam_lr: float = 1e-3
    sgd_lr: float = 1e-2
    eval_inner_steps: int = 50
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    run_as: str = "traced"
    bf16: bool = False

    @cached_property
    def data(self) -> EpisodeDataModule:
        """The data, loaded."""
        data = self.make_data()
        data.on_device = self.run_as == "captured"
        data.setup("fit")
        return data

    def network(self, seed: int = 0) -> nn.Module:
        """The network, with the same weights each time."""
        torch.manual_seed(seed)
        return self.make_network().to(self.device, self.dtype)

    def prepared(self, kind: str, number: torch.Tensor) -> Episode:
        """Tasks `number` as the network takes them."""
        episode = self.data.episodes("test" if kind == "evaluation" else "train", number).to(self.device)
        return self.data.on_after_batch_transfer(episode, 0).floating(self.dtype)

    def episode(self, kind: str) -> Episode:
        """The first meta-batch of training, or of evaluation."""
        tasks = self.data.eval_tasks_per_batch if kind == "evaluation" else self.data.meta_batch_size
        return self.prepared(kind, torch.arange(tasks))

    def indices(self, kind: str, episode: Episode) -> MinibatchIndices:
        """The mini-batches, as fomal draws them."""
        steps, batch = self.inner_steps, self.inner_batch_size
        if kind == "evaluation":
            steps, batch = self.eval_inner_steps, self.eval_inner_batch_size
        stream = (episode.seed, episode.split, episode.number)
        return minibatch_indices(*stream, episode.support_x.shape[1], steps, batch)

    def optimizer(self, optimizer: str) -> InnerOptimizer:
        """Adam with beta1 = 0, or SGD."""
        return Adam(self.adam_lr) if optimizer == "adam" else SGD(self.sgd_lr)

    def learner(self, kind: str, optimizer: str, seed: int = 0) -> MetaLearner:
        """fomal's learner of this work."""
        return MetaLearner(
            self.network(seed),
            RULES.get(kind, Reptile)(),
            self.optimizer(optimizer),
            inner_state="reset",  # a peer has no other
            train=InnerSchedule(self.inner_steps, self.inner_batch_size),
            eval=InnerSchedule(self.eval_inner_steps, self.eval_inner_batch_size),
            execution=Execution(**RUN_AS[self.run_as]),
        )

    def without(self, kind: str) -> str | None:
        """Why this work has no such kind; None where it has."""
        if kind == "evaluation" and isinstance(self.data, SinusoidDataModule):
            return "the two protocols of evaluation are those of classification"
        if self.run_as == "captured" and kind in ("evaluation", "replicas"):
            return f"cuda_graph does not capture {kind}"
        if self.run_as in ("compiled", "captured") and kind == "memory":
            return f"what is {self.run_as} takes its memory unseen"
        return None


def omniglot(ways: int, steps: int, batch: int, eval_batch: int, lr: float, iterations: int) -> Work:
    """Omniglot's shapes; 5 query images per class for the rules that need them."""
    return Work(
        f"omniglot_{ways}way",
        lambda: Conv4(ways),
        lambda: RandomImages(1, 28, 20, ways=ways, train_shots=10, train_query_shots=5),
        inner_steps=steps,
        inner_batch_size=batch,
        eval_inner_batch_size=eval_batch,
        fit_iterations=iterations,
        adam_lr=lr,
    )


WORKS = {
    work.name: work
    for work in (
        omniglot(5, steps=5, batch=10, eval_batch=5, lr=1e-3, iterations=50),
        omniglot(20, steps=10, batch=20, eval_batch=10, lr=5e-4, iterations=10),
        Work(
            "mini_imagenet",
            lambda: Conv4(5, in_channels=3, image_size=84, filters=32, downsample="pool", padding="symmetric"),
            lambda: RandomImages(3, 84, 30, ways=5, train_shots=15, train_query_shots=5),
            inner_steps=8,
            inner_batch_size=10,
            eval_inner_batch_size=5,
            fit_iterations=5,
        ),
        Work(
            "sine",
            MLP,
            lambda: SinusoidDataModule(shots=10, train_query_shots=10, meta_batch_size=25),
            inner_steps=10,
            inner_batch_size=10,
            eval_inner_batch_size=10,
            fit_iterations=50,
        ),
    )
}
