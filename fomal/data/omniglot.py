"""Omniglot: hand-drawn characters of 50 alphabets (Lake, Salakhutdinov & Tenenbaum 2015)."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from fomal.data.images.class_images import ClassImages, ImageDataModule
from fomal.data.images.image_format import ImageFormat
from fomal.data.images.omniglot_files import PARTS, load_characters
from fomal.tasks.philox import LARGEST_SEED
from fomal.tasks.sampler import shuffled
from fomal.utils.checks import countable, height_and_width, one_of, positive


class OmniglotDataModule(ImageDataModule):
    """N-way K-shot tasks from Omniglot's 1623 characters with 20 drawings each (Nichol et al. 2018, 6.1).

    After `setup`, `classes` holds each split and `characters` its names "part/alphabet/character"; with
    `rotations`, training classes 4 i .. 4 i + 3 are those of training character i.

    Args:
        root: folder with `images_background` and `images_evaluation`, each as the zip of the original
            distribution or as the folder extracted from it; also `torchvision.datasets.Omniglot`'s root.
        download: fetch what `root` lacks.
        cache_dir: folder for the decoded images; None means `$XDG_CACHE_HOME/fomal` or `~/.cache/fomal`.
        image_size: height and width of the images, in pixels.
        rotations: a training character turned by 0, 90, 180 and 270 degrees makes four classes; validation
            and test characters are never turned.
        partition: "random": `train_classes` random characters of both parts for training, the others for
            testing, as in the paper; "alphabet": the alphabets of `images_background` for training, those of
            `images_evaluation` for testing.
        train_classes: training characters, before rotation, of the random partition.
        val_classes: validation characters, taken out of the training characters; 0 validates on tasks from
            the training characters themselves.
        partition_seed: seed of the random choices of characters; apart from `seed`, so that new tasks never
            turn training characters into test characters.
        kwargs: see `ImageDataModule`.
    """

    division_advice = ", by data.train_classes and data.val_classes"
    partition_settings = frozenset({"partition", "partition_seed", "train_classes", "val_classes", "rotations"})
    characters: dict[str, list[str]]

    def __init__(
        self,
        root: str = "data/omniglot",
        download: bool = False,
        cache_dir: str | None = None,
        image_size: int = 28,
        rotations: bool = True,
        partition: Literal["random", "alphabet"] = "random",
        train_classes: int = 1200,
        val_classes: int = 0,
        partition_seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(rotations=rotations, **kwargs)
        height_and_width(image_size)
        positive(train_classes=train_classes)
        countable(val_classes=val_classes)
        countable(LARGEST_SEED, partition_seed=partition_seed)
        one_of(("random", "alphabet"), partition=partition)
        self.root = root
        self.download = download
        self.cache_dir = cache_dir
        self.image_size = image_size
        self.partition = partition
        self.train_classes = train_classes
        self.val_classes = val_classes
        self.partition_seed = partition_seed
        self.characters = {}
        self.image_format = ImageFormat(image_size, image_size, "binary", "stretch", "nearest")

    def prepare_data(self) -> None:
        """Download what is missing and build the cache file, once per machine."""
        load_characters(self.root, self.download, self.cache_dir, self.image_size)

    def load(self) -> dict[str, ClassImages]:
        """The characters of each split."""
        images, counts, names = load_characters(self.root, self.download, self.cache_dir, self.image_size)
        everything, splits = ClassImages.of(images, counts), self.split(names)
        self.characters = {split: [names[i] for i in chosen.tolist()] for split, chosen in splits.items()}
        return {split: everything.select(chosen) for split, chosen in splits.items()}

    def split(self, names: list[str]) -> dict[str, Tensor]:
        """Which of the characters `names` each split has: int64 indices, a pure function of the arguments."""
        if self.partition == "random":
            total = len(names)
            if self.train_classes >= total:
                raise ValueError(
                    f"train_classes={self.train_classes} leaves none of the {total} characters in "
                    f"root={self.root!r} for testing: use data.train_classes < {total}."
                )
            order = shuffled(self.partition_seed, total)
            train, test = order[: self.train_classes], order[self.train_classes :]
        else:
            in_test = torch.tensor([name.startswith(f"{PARTS[1]}/") for name in names])
            train, test = (~in_test).nonzero()[:, 0], in_test.nonzero()[:, 0]
            train = train[shuffled(self.partition_seed, len(train))]
        if self.val_classes >= len(train):
            raise ValueError(
                f"val_classes={self.val_classes} leaves none of the {len(train)} training characters for training: "
                f"use data.val_classes < {len(train)}."
            )
        val = train[: self.val_classes] if self.val_classes else train
        return {"train": train[self.val_classes :], "val": val, "test": test}

    def preprocess(self, x: Tensor) -> Tensor:
        """Pixels uint8 0 or 1 to float32 0.0 or 1.0; ink is 0."""
        return x.to(torch.float32)
