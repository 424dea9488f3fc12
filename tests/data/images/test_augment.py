"""Transforms of training images: what they draw, for whom, and that an episode's number alone decides it."""

from __future__ import annotations

from itertools import islice

import pytest
import torch
from torch import Tensor, nn
from torchvision.transforms import v2

from fomal.data.images.augment import Sampled, Turned
from fomal.data.images.class_images import ClassImages, ImageDataModule
from fomal.tasks.datamodule import EpisodeStream

CLASSES, IMAGES = 7, 6


class Shift(nn.Module):
    """Adds one random number to the last channel, modulo 256."""

    def forward(self, x: Tensor) -> Tensor:
        y = x.clone()
        y[..., 2, :, :] += torch.randint(256, (), dtype=torch.uint8)
        return y


class Double(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2


class Labelled(ImageDataModule):
    """Images (class, number, 0) in their three channels, so that what was drawn can be read off."""

    def load(self) -> dict[str, ClassImages]:
        images = torch.zeros(CLASSES * IMAGES, 3, 2, 2, dtype=torch.uint8)
        images[:, 0] = torch.arange(CLASSES).repeat_interleave(IMAGES).view(-1, 1, 1)
        images[:, 1] = torch.arange(IMAGES).repeat(CLASSES).view(-1, 1, 1)
        everything = ClassImages.of(images, torch.full((CLASSES,), IMAGES))
        return dict.fromkeys(("train", "val", "test"), everything)


def labelled(**settings) -> Labelled:
    data = Labelled(**{"ways": 3, "shots": 2, "query_shots": 1, "train_query_shots": 1, **settings})
    data.setup()
    return data


def grouped(episode) -> tuple[Tensor, Tensor]:
    """Class and number (T, ways, K + Q, 2) of the images of an episode, and what their last channel has."""
    tasks, ways = len(episode.number), episode.ways
    parts = [x.view(tasks, ways, -1, 3, 2, 2) for x in (episode.support_x, episode.query_x)]
    x = torch.cat(parts, 2)
    assert (x[..., 2, :, :] == x[..., 2, :1, :1]).all()
    return x[..., :2, 0, 0], x[..., 2, 0, 0].long()


def same(one, other) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one[:5], other[:5], strict=True))


NUMBERS = torch.arange(400)


# -- what is drawn, and for whom


def test_a_class_transform_draws_once_for_all_images_of_a_class() -> None:
    plain, _ = grouped(labelled().episodes("train", NUMBERS))
    chosen, drawn = grouped(labelled(class_transforms=[Shift()]).episodes("train", NUMBERS))
    assert torch.equal(chosen, plain)  # the same classes and images
    assert (drawn == drawn[..., :1]).all()  # support and query alike
    drawn = drawn[..., 0].flatten().double()
    assert drawn.min() == 0  # 1200 draws
    assert drawn.max() == 255
    assert abs(drawn.mean() - 127.5) < 4 * 73.9 / len(drawn) ** 0.5
    assert abs(torch.corrcoef(drawn.view(-1, 3).T)[0, 1]) < 4 / 400**0.5  # of a task's classes


def test_an_image_transform_draws_for_each_image() -> None:
    plain, _ = grouped(labelled().episodes("train", NUMBERS))
    chosen, drawn = grouped(labelled(image_transforms=[Shift()]).episodes("train", NUMBERS))
    assert torch.equal(chosen, plain)
    drawn = drawn.view(-1, 3).double()  # (classes, images)
    assert abs(drawn.mean() - 127.5) < 4 * 73.9 / drawn.numel() ** 0.5
    assert (torch.corrcoef(drawn.T).triu(1).abs() < 4 / len(drawn) ** 0.5).all()
    assert (drawn[:, 0] == drawn[:, 1]).double().mean() < 4 / 256


def test_transforms_follow_each_other_and_each_draws_anew() -> None:
    def draw(**transforms) -> Tensor:
        return grouped(labelled(**transforms).episodes("train", NUMBERS))[1]

    by_class, by_image = draw(class_transforms=[Shift()]), draw(image_transforms=[Shift()])
    assert torch.equal(draw(class_transforms=[Shift(), Double()]), by_class * 2 % 256)
    assert not torch.equal(draw(class_transforms=[Double(), Shift()]), by_class * 2 % 256)
    assert torch.equal(draw(class_transforms=[Shift()], image_transforms=[Double()]), by_class * 2 % 256)
    assert torch.equal(draw(class_transforms=[Shift()], image_transforms=[Shift()]), (by_class + by_image) % 256)
    for kind, first in (("class_transforms", by_class), ("image_transforms", by_image)):
        second = (draw(**{kind: [Shift(), Shift()]}) - first) % 256
        each = torch.stack([first, second])[..., 0].flatten(1).double()  # (2, classes)
        assert abs(torch.corrcoef(each)[0, 1]) < 4 / 1200**0.5


def test_torchvisions_transforms_flip_about_half_the_images() -> None:
    class Pictures(Labelled):
        def load(self) -> dict[str, ClassImages]:
            images = torch.randint(256, (12, 3, 5, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
            return {"train": ClassImages.of(images, torch.tensor([6, 6]))}

    settings = {"ways": 2, "shots": 3}
    plain, flipped = Pictures(**settings), Pictures(**settings, image_transforms=[v2.RandomHorizontalFlip(0.5)])
    plain.setup()
    flipped.setup()
    before, after = (data.episodes("train", NUMBERS).support_x.flatten(0, 1) for data in (plain, flipped))
    turned = (after == before.flip(-1)).flatten(1).all(1)
    assert torch.equal(after[~turned], before[~turned])
    assert abs(turned.double().mean() - 0.5) < 4 * 0.5 / len(turned) ** 0.5


@pytest.mark.parametrize("split", ["val", "test"])
def test_training_images_alone_are_transformed(split: str) -> None:
    everything = {"class_transforms": [Shift()], "image_transforms": [Shift()], "new_classes": [Shift()]}
    assert same(labelled(**everything).episodes(split, NUMBERS), labelled().episodes(split, NUMBERS))


# -- new classes


def test_new_classes_are_drawn_once_and_for_all() -> None:
    def shift(place: int) -> int:
        torch.manual_seed(place)
        return int(Shift()(torch.zeros(3, 1, 1, dtype=torch.uint8))[2])

    shifts = {0, shift(0), shift(1)}
    assert len(shifts) == 3
    for data in (labelled(new_classes=[Shift(), Shift()]), labelled(new_classes=[Shift(), Shift()], seed=5, shots=1)):
        assert len(data.classes["train"].first) == 3 * CLASSES
        chosen, drawn = grouped(data.episodes("train", NUMBERS))
        assert (chosen[..., 0] == chosen[..., :1, 0]).all()  # all images of a label are of one class
        assert (drawn == drawn[..., :1]).all()  # and of one variant of it
        found = torch.stack([chosen[..., 0, 0].long(), drawn[..., 0]], -1)  # (T, ways, 2)
        assert all(len(set(map(tuple, task))) == 3 for task in found.tolist())  # no class twice in a task
        assert set(map(tuple, found.flatten(0, 1).tolist())) == {(c, s) for c in range(CLASSES) for s in shifts}


def test_rotations_and_new_classes_add_up() -> None:
    classes = labelled(rotations=True, new_classes=[v2.RandomHorizontalFlip(1.0)]).classes
    assert [len(classes[split].first) for split in ("train", "val", "test")] == [5 * CLASSES, CLASSES, CLASSES]
    images = torch.randint(256, (2, 3, 1, 4, 4), dtype=torch.uint8)
    expected = [images.rot90(turns, (-2, -1)) for turns in (1, 2, 3)] + [images.flip(-1)]
    variants = classes["train"].variants
    assert all(torch.equal(variant(images), wanted) for variant, wanted in zip(variants, expected, strict=True))
    assert [type(variant) for variant in variants] == [Turned] * 3 + [Sampled]


# -- purity

EVERYTHING = {
    "rotations": True,
    "new_classes": [Shift()],
    "class_transforms": [v2.RandomChoice([Shift(), Double()])],
    "image_transforms": [Shift(), v2.RandomHorizontalFlip(0.5)],
}


def test_an_episode_does_not_depend_on_the_batch_or_on_what_was_drawn_before() -> None:
    data = labelled(**EVERYTHING)
    many = data.episodes("train", torch.arange(9))
    for number in reversed(range(9)):
        torch.manual_seed(number)
        assert same(data.episodes("train", torch.tensor([number])), many.select(torch.tensor([number])))
    assert same(labelled(**EVERYTHING).episodes("train", torch.arange(9)), many)
    assert not same(labelled(**EVERYTHING, seed=1).episodes("train", torch.arange(9)), many)


def test_the_stream_is_the_same_in_worker_processes_and_after_a_restart() -> None:
    streams = [list(islice(iter(labelled(**EVERYTHING, num_workers=w).train_dataloader()), 4)) for w in (0, 2)]
    resumed = list(islice(iter(EpisodeStream(labelled(**EVERYTHING), "train", 5, start=2)), 2))
    assert [episode.number.tolist()[0] for episode in streams[0]] == [0, 5, 10, 15]
    assert all(same(*pair) for pair in zip(*streams, strict=True))
    assert all(same(*pair) for pair in zip(streams[0][2:], resumed, strict=True))


def test_torchs_generator_and_the_images_are_left_as_they_were() -> None:
    data = labelled(**EVERYTHING)
    before = torch.get_rng_state(), data.classes["train"].images.clone()
    data.episodes("train", torch.arange(5))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert torch.equal(data.classes["train"].images, before[1])
    data = labelled(class_transforms=[Shift(), v2.CenterCrop(1)])
    with pytest.raises(ValueError, match="CenterCrop"):
        data.episodes("train", torch.arange(5))
    assert torch.equal(torch.get_rng_state(), before[0])


# -- what no transform may do


@pytest.mark.parametrize("place", ["new_classes", "class_transforms", "image_transforms"])
@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (v2.Resize((4, 3)), r"the transform Resize makes \(\d, 3, 4, 3\) torch.uint8 of images \(\d, 3, 2, 2\) torch."),
        (v2.ToDtype(torch.float32, scale=True), r"the transform ToDtype makes \(\d, 3, 2, 2\) torch.float32 of images"),
        (v2.Lambda(tuple), r"the transform Lambda makes tuple of images .*: use one that keeps both; sizes and norm"),
    ],
    ids=["shape", "dtype", "tuple"],
)
def test_transforms_that_change_shape_or_type_are_refused(place: str, transform: nn.Module, message: str) -> None:
    data = labelled(**{place: [transform]})
    with pytest.raises(ValueError, match=message):
        data.episodes("train", torch.arange(40))
