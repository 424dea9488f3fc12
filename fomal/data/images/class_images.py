"""Classification tasks from images grouped by class."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from fomal.data.images.augment import Sampled, Turned, Variant, augmented
from fomal.data.images.image_format import ImageFormat
from fomal.data.images.store import Cached, Decoding
from fomal.tasks.datamodule import EpisodeDataModule, split_index
from fomal.tasks.episode import Episode
from fomal.tasks.sampler import augment_words, choose
from fomal.utils.checks import several


class ClassImages(NamedTuple):
    """K classes over N images; several classes may be variants of the same images, e.g. turned.

    Attributes:
        images: (N, C, H, W) uint8, in memory, or read or decoded when they are asked for.
        rows: (M,) int64, the places in `images` of one class's images after the other's.
        first: (K,) int64, where in `rows` each class begins.
        counts: (K,) int64, how many images it has.
        variant: (K,) int64, 0 for the images as they are, else 1 + a place in `variants`.
        variants: what is done to them.
    """

    images: Tensor | Cached | Decoding
    rows: Tensor
    first: Tensor
    counts: Tensor
    variant: Tensor
    variants: tuple[Variant, ...] = ()

    @classmethod
    def of(cls, images: Tensor | Cached | Decoding, counts: Tensor, rows: Tensor | None = None) -> ClassImages:
        """Classes with `counts` (K,) images each, which follow each other in `rows`, or else in `images`."""
        rows = torch.arange(images.shape[0]) if rows is None else rows
        return cls(images, rows, counts.cumsum(0) - counts, counts, torch.zeros_like(counts))

    def select(self, classes: Tensor) -> ClassImages:
        """The same images with only the given classes (an int64 index into the K classes)."""
        first, counts, variant = (t[classes] for t in (self.first, self.counts, self.variant))
        return self._replace(first=first, counts=counts, variant=variant)

    def varied(self, variants: Sequence[Variant]) -> ClassImages:
        """1 + V classes for each class: as it is, and in each of V variants. Of classes that have none yet."""
        each = 1 + len(variants)
        first, counts = (t.repeat_interleave(each) for t in (self.first, self.counts))
        variant = torch.arange(each).repeat(len(self.first))
        return self._replace(first=first, counts=counts, variant=variant, variants=tuple(variants))

    def take(self, classes: Tensor, members: Tensor) -> Tensor:
        """Images `members` (T, W, M) of `classes` (T, W), varied as the classes ask: (T, W, M, C, H, W) uint8."""
        index = self.rows[self.first[classes][..., None] + members]  # (T, W, M)
        x = self.images.index_select(0, index.flatten()).view(*index.shape, *self.images.shape[1:])
        wanted = self.variant[classes]  # (T, W)
        for number, variant in enumerate(self.variants, 1):
            here = wanted == number  # (T, W)
            if here.any() and index.numel():
                x[here] = variant(x[here].flatten(0, 1)).view(-1, *x.shape[2:])
        return x  # (T, W, M, C, H, W)

    def resident(self, device: torch.device) -> ClassImages:
        """The same classes with all their images on `device`, varied once and for all, so that `take` only gathers."""
        every = enumerate(self.counts.tolist())
        images = [self.take(torch.tensor([[k]]), torch.arange(n)[None, None])[0, 0] for k, n in every]
        packed = ClassImages.of(torch.cat(images).to(device), self.counts)
        rows, first, counts, variant = (t.to(device) for t in packed[1:5])
        return ClassImages(packed.images, rows, first, counts, variant)


class ImageDataModule(EpisodeDataModule):
    """N-way K-shot tasks from images, which a data set gives in `load`.

    Args:
        ways: classes per task, at least 2.
        rotations: each training class turned by 0, 90, 180 and 270 degrees makes four classes.
        new_classes: transforms, e.g. of torchvision's v2, each of which makes a further class of each training class;
            a random one is sampled once and for all.
        class_transforms: transforms of training images, sampled for each class of a task.
        image_transforms: transforms of training images, sampled for each image of a task, thereafter.
        kwargs: see `EpisodeDataModule`.

    Attributes:
        classes: the classes of each split, after `setup`.
        division_advice: how the user gives a split more classes, for the end of a message.
        image_format: how a user's own image files become such images; None where files mean nothing.

    Raises:
        ValueError: `on_device` with `class_transforms` or `image_transforms`.
    """

    samples_anywhere: ClassVar[bool] = True
    division_advice: ClassVar[str] = ""
    classes: dict[str, ClassImages]
    image_format: ImageFormat | None = None

    def __init__(
        self,
        ways: int = 5,
        rotations: bool = False,
        new_classes: list[nn.Module] | None = None,
        class_transforms: list[nn.Module] | None = None,
        image_transforms: list[nn.Module] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        several(ways=ways)
        self.ways = ways
        self.rotations = rotations
        self.new_classes = new_classes or []
        self.class_transforms = class_transforms or []
        self.image_transforms = image_transforms or []
        if self.on_device and (self.class_transforms or self.image_transforms):
            raise ValueError(
                "on_device=True: class_transforms and image_transforms sample on the CPU: leave on_device out, or use "
                "new_classes, which are sampled once and for all."
            )
        self.classes = {}
        self._resident: dict[tuple[str, torch.device], ClassImages] = {}

    @abstractmethod
    def load(self) -> dict[str, ClassImages]:
        """The classes of each split."""

    def setup(self, stage: str | None = None) -> None:
        """Load all splits, whatever the `stage`; cheap when they are loaded already.

        Raises:
            ValueError: a split has too few classes, or a class too few images, for a task; `on_device` of images that
                are not in memory; `rotations` of images that are not square.
        """
        if not self.classes:
            classes = self.load()
            variants: list[Variant] = [Turned(turns) for turns in (1, 2, 3)] if self.rotations else []
            variants += [Sampled(transform, place) for place, transform in enumerate(self.new_classes)]
            if variants and "train" in classes:
                classes["train"] = classes["train"].varied(variants)
            self.classes = classes
        if self.on_device and "train" in self.classes and isinstance(self.classes["train"].images, Decoding):
            raise ValueError(
                "on_device=True needs the images in memory, but they are decoded when episodes need them: raise "
                "data.cache_gb, set data.cache_dir to a folder with more room, or leave on_device out."
            )
        self.check_sizes()

    def teardown(self, stage: str) -> None:
        """Free the device's memory."""
        self._resident = {}

    def check_sizes(self) -> None:
        """Raise ValueError unless every split has enough classes, and every class enough images, for a task."""
        self.check_counts({split: classes.counts.tolist() for split, classes in self.classes.items()})
        for classes in self.classes.values():
            height, width = classes.images.shape[-2:]
            if self.rotations and height != width:
                raise ValueError(f"rotations=True needs square images, not {height} x {width}: leave it out.")

    def check_counts(self, counts: Mapping[str, Sequence[int]]) -> None:
        """Raise ValueError unless there are enough classes and images for a task.

        Args:
            counts: how many images each class of a split has.
        """
        for split, images in counts.items():
            if self.ways > len(images):
                raise ValueError(self._too_few_classes(split, len(images)))
            support, query = self.examples(split)
            smallest = min(images)
            if support + query > smallest:
                names = ("train_shots", "train_query_shots") if split == "train" else ("shots", "query_shots")
                remedy = f"use at most {smallest} together" if smallest > 1 else "give its classes more images"
                raise ValueError(
                    f"{names[0]}={support} plus {names[1]}={query} exceeds the {smallest} images that the smallest "
                    f"class of the {split} split has: {remedy}, or leave such classes out."
                )

    def _too_few_classes(self, split: str, available: int) -> str:
        """What to do about a split with fewer classes than a task has."""
        remedy = f"use ways <= {available}, or give" if available > 1 else "give"
        plural = "class" if available == 1 else "classes"
        return (
            f"ways={self.ways} exceeds the {available} {plural} of the {split} split: {remedy} it more classes"
            f"{self.division_advice}."
        )

    def episodes(self, split: str, number: Tensor) -> Episode:
        """Tasks `number` (T,) int64 of a split, on their device, where the images stay then; uint8 until `preprocess`.

        Raises:
            ValueError: the data have no such split.
        """
        place = split_index(split)
        if split not in self.classes:
            raise ValueError(f"the data have no {split} classes, only those of {', '.join(self.classes)}: add some.")
        classes = self._classes_on(split, number.device)
        shots, query_shots = self.examples(split)
        chosen, members = choose(self.seed, place, number, classes.counts, self.ways, shots + query_shots)
        if split == "train" and (self.class_transforms or self.image_transforms):
            words = augment_words(self.seed, place, number, self.ways * (1 + shots + query_shots))
            words = words.view(len(number), self.ways, -1)  # (T, W, 1 + K + Q)
            x = augmented(classes.take(chosen, members), words, self.class_transforms, self.image_transforms)
            support, query = x[:, :, :shots], x[:, :, shots:]  # (T, W, K or Q, C, H, W)
        else:
            support, query = (classes.take(chosen, part) for part in (members[..., :shots], members[..., shots:]))
        return Episode.of_classes(support, query, number, self.seed, place)

    def _classes_on(self, split: str, device: torch.device) -> ClassImages:
        if device.type == "cpu":
            return self.classes[split]
        if (split, device) not in self._resident:
            self._resident[split, device] = self.classes[split].resident(device)
        return self._resident[split, device]

    def preprocess(self, x: Tensor) -> Tensor:
        """Pixels uint8 to the float32 values that `image_format` makes of them."""
        if self.image_format is None:
            raise NotImplementedError(f"{type(self).__name__} must set image_format or override preprocess.")
        return self.image_format.normalize(x)
