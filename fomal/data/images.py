"""Classification tasks from images held in memory, grouped by class."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fomal.checks import positive
from fomal.data.datamodule import EpisodeDataModule, split_index
from fomal.data.episode import Episode
from fomal.data.sampler import choose


class ClassImages(NamedTuple):
    """K classes over N images; several classes may be rotations of the same images.

    Attributes:
        images: (N, C, H, W) uint8.
        first: (K,) int64, where the images of each class begin.
        counts: (K,) int64, how many there are; they follow each other.
        turns: (K,) int64, by how many quarter turns, counter-clockwise, the images of a class are rotated.
    """

    images: Tensor
    first: Tensor
    counts: Tensor
    turns: Tensor

    def select(self, classes: Tensor) -> ClassImages:
        """The same images with only the given classes (an int64 index into the K classes)."""
        return ClassImages(self.images, self.first[classes], self.counts[classes], self.turns[classes])

    def rotated(self) -> ClassImages:
        """Four classes for each class: turned by 0, 90, 180 and 270 degrees."""
        first, counts = (t.repeat_interleave(4) for t in (self.first, self.counts))
        turns = (self.turns[:, None] + torch.arange(4)).flatten() % 4
        return ClassImages(self.images, first, counts, turns)

    def take(self, classes: Tensor, members: Tensor) -> Tensor:
        """Images `members` (T, W, M) of `classes` (T, W), turned as the classes ask: (T, W, M, C, H, W) uint8."""
        index = self.first[classes][..., None] + members  # (T, W, M)
        x = self.images[index.flatten()].view(*index.shape, *self.images.shape[1:])  # (T, W, M, C, H, W)
        turns = self.turns[classes]  # (T, W)
        if not turns.any():
            return x
        height, width = x.shape[-2:]
        grid = torch.arange(height * width).view(height, width)
        table = torch.stack([grid.rot90(k).flatten() for k in range(4)])  # (4, H W): pixel that lands here
        order = table[turns][:, :, None, None, :].expand(*x.shape[:4], -1)  # (T, W, M, C, H W)
        return x.flatten(-2).gather(-1, order).view(x.shape)


class ImageDataModule(EpisodeDataModule):
    """N-way K-shot tasks from a `ClassImages` per split, which a dataset puts into `self.classes` in `setup`.

    Args:
        ways: classes per task.
        kwargs: see `EpisodeDataModule`.
    """

    classes: dict[str, ClassImages]

    def __init__(self, ways: int = 5, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        positive(ways=ways)
        self.ways = ways
        self.classes = {}

    def check_sizes(self) -> None:
        """Raise ValueError unless every split has enough classes, and every class enough images, for a task."""
        for split, classes in self.classes.items():
            available = len(classes.first)
            if self.ways > available:
                raise ValueError(
                    f"ways={self.ways} exceeds the {available} classes of the {split} split: use ways <= {available}."
                )
            support, query = self.examples(split)
            smallest = int(classes.counts.min())
            if support + query > smallest:
                names = ("train_shots", "train_query_shots") if split == "train" else ("shots", "query_shots")
                raise ValueError(
                    f"{names[0]}={support} plus {names[1]}={query} exceeds the {smallest} images that the smallest "
                    f"class of the {split} split has: use at most {smallest} together."
                )

    def episodes(self, split: str, number: Tensor) -> Episode:
        """Tasks `number` of a split; images stay uint8 until `preprocess`."""
        place, classes = split_index(split), self.classes[split]
        shots, query_shots = self.examples(split)
        chosen, members = choose(self.seed, place, number, classes.counts, self.ways, shots + query_shots)
        x = classes.take(chosen, members)  # (T, W, K + Q, C, H, W)
        label = torch.arange(self.ways)
        return Episode(
            support_x=x[:, :, :shots].flatten(1, 2),
            support_y=label.repeat_interleave(shots).expand(len(number), -1),
            query_x=x[:, :, shots:].flatten(1, 2),
            query_y=label.repeat_interleave(query_shots).expand(len(number), -1),
            number=number,
            ways=self.ways,
            seed=self.seed,
            split=place,
        )
