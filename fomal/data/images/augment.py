"""Transforms of training images, sampled by the episode's number: the same on any number of workers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

Variant = Callable[[Tensor], Tensor]
"""Images (n, C, H, W) uint8, each by itself, to the same of other classes."""


class Turned:
    """Images turned by quarter turns, counter-clockwise."""

    def __init__(self, turns: int) -> None:
        self.turns = turns

    def __call__(self, x: Tensor) -> Tensor:
        """(n, C, H, W), of square images."""
        return x.rot90(self.turns, (-2, -1))


class Sampled:
    """A transform with the same random choices wherever it is used, so that its images are a class of their own.

    Args:
        transform: of torchvision's v2, or alike: (M, C, H, W) uint8 to the same, sampling from torch's generator.
        seed: of the choices.
    """

    def __init__(self, transform: nn.Module, seed: int) -> None:
        self.transform, self.seed = transform, seed

    def __call__(self, x: Tensor) -> Tensor:
        """(n, C, H, W)."""
        with _own_generator():
            return torch.cat([transformed(self.transform, image[None], self.seed) for image in x])


def augmented(
    x: Tensor, words: Tensor, class_transforms: Sequence[nn.Module], image_transforms: Sequence[nn.Module]
) -> Tensor:
    """Images of tasks after random transforms.

    Args:
        x: (T, W, M, C, H, W) uint8.
        words: (T, W, 1 + M) 32-bit words, seeds for each class of a task and for each of its images.
        class_transforms: applied to all images of a class alike.
        image_transforms: applied to each image by itself, thereafter.
    """
    x, seeds = x.clone(), words.flatten(0, 1).tolist()
    with _own_generator():
        for images, (seed, *each) in zip(x.flatten(0, 1), seeds, strict=True):  # views of x
            for place, transform in enumerate(class_transforms):
                images[:] = transformed(transform, images, seed + place)
            for place, transform in enumerate(image_transforms):
                for image, own in zip(images, each, strict=True):
                    image[:] = transformed(transform, image[None], own + place)[0]
    return x


def transformed(transform: nn.Module, x: Tensor, seed: int) -> Tensor:
    """Apply `transform` to x (M, C, H, W) uint8 with torch's generator seeded; within `_own_generator`.

    Raises:
        ValueError: it returns another shape or type.
    """
    torch.default_generator.manual_seed(seed)  # of the CPU alone
    y = transform(x)
    if not isinstance(y, Tensor) or y.shape != x.shape or y.dtype != x.dtype:
        found = f"{tuple(y.shape)} {y.dtype}" if isinstance(y, Tensor) else type(y).__name__
        raise ValueError(
            f"the transform {type(transform).__name__} makes {found} of images {tuple(x.shape)} {x.dtype}: use one "
            f"that keeps both; sizes and normalisation are settings of the datamodule."
        )
    return y


@contextmanager
def _own_generator() -> Iterator[None]:
    """Leave torch's generator as it was."""
    state = torch.default_generator.get_state()
    try:
        yield
    finally:
        torch.default_generator.set_state(state)
