import pytest
import torch
from torchvision.transforms import v2

from fomal.data.images.augment import Sampled, Turned
from fomal.data.images.class_images import ClassImages, ImageDataModule
from fomal.data.images.image_format import ImageFormat
from fomal.data.images.store import Decoding


@pytest.fixture
def classes():
    images = torch.randint(0, 256, (13, 2, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return ClassImages.of(images, torch.tensor([5, 4, 4]))


def test_take_gathers_and_turns_as_rot90_does(classes):
    turned = classes.varied([Turned(k) for k in (1, 2, 3)])
    assert len(turned.first) == 12
    chosen, members = torch.tensor([[1, 7, 10], [0, 3, 8]]), torch.tensor([[[0, 3], [1, 1], [2, 0]]] * 2)
    taken = turned.take(chosen, members)
    assert taken.dtype == torch.uint8
    for t in range(2):
        for w in range(3):
            for m in range(2):
                character, turns = divmod(int(chosen[t, w]), 4)
                image = classes.images[classes.first[character] + members[t, w, m]]
                assert torch.equal(taken[t, w, m], torch.rot90(image, turns, (-2, -1)))


def test_classes_are_rows_of_the_images_in_any_order(classes):
    rows = torch.tensor([7, 3, 11, 0, 5])
    some = ClassImages.of(classes.images, torch.tensor([2, 3]), rows)
    variants = [Turned(2), Sampled(v2.RandomVerticalFlip(1.0), 0)]
    some = some.select(torch.tensor([1, 0])).varied(variants).select(torch.tensor([5, 0, 1, 3]))
    assert some.counts.tolist() == [2, 3, 3, 2]
    taken = some.take(torch.arange(4).view(1, 4), torch.tensor([[[0, 1], [2, 0], [1, 1], [1, 0]]]))[0]  # (4, 2, ...)
    expected = [[7, 3], [5, 11], [0, 0], [3, 7]]
    change = [lambda x: x.flip(-2), lambda x: x, lambda x: x.flip(-2, -1), lambda x: x]
    for images, places, changed in zip(taken, expected, change, strict=True):
        assert torch.equal(images, changed(classes.images[places]))
    assert classes.images.shape == (13, 2, 4, 4)
    assert not torch.equal(taken[0], classes.images[expected[0]])  # they are left as they were


def test_episodes_hold_distinct_images_of_their_class(classes):
    classes = classes._replace(images=torch.arange(13, dtype=torch.uint8).view(13, 1, 1, 1))
    data = ImageDataModule(ways=3, shots=2, query_shots=2)
    data.classes = {"test": classes}
    data.check_sizes()
    episode = data.episodes("test", torch.arange(20)).check()
    assert episode.support_y.tolist() == [[0, 0, 1, 1, 2, 2]] * 20
    which = torch.bucketize(torch.arange(13), classes.first, right=True) - 1
    for t in range(20):
        images = torch.cat([episode.support_x[t].flatten(), episode.query_x[t].flatten()]).long()
        assert len(images.unique()) == 12
        by_label = {
            int(y): {int(c) for c in which[images[torch.cat([episode.support_y[t], episode.query_y[t]]) == y]]}
            for y in range(3)
        }
        assert sorted(by_label.values(), key=sorted) == [{0}, {1}, {2}]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ways": 4}, "ways=4 exceeds the 3 classes of the test split: use ways <= 3"),
        ({"ways": 2, "shots": 4}, "shots=4 plus query_shots=1 exceeds the 4 images .* test split has: use at most 4"),
    ],
)
def test_tasks_larger_than_the_data_are_refused(classes, settings, message):
    data = ImageDataModule(**settings)
    data.classes = {"test": classes}
    with pytest.raises(ValueError, match=message):
        data.check_sizes()


def test_turning_images_that_are_not_square_is_refused(classes):
    class Wide(ImageDataModule):
        def load(self):
            return {"train": classes._replace(images=classes.images[..., :3])}

    Wide(ways=2).setup()
    with pytest.raises(ValueError, match="rotations=True needs square images, not 4 x 3: leave it out"):
        Wide(ways=2, rotations=True).setup()


def test_a_split_that_there_is_not_is_refused_when_it_is_asked_for(classes):
    data = ImageDataModule(ways=2)
    data.classes = {"train": classes, "val": classes}
    data.check_sizes()
    data.episodes("val", torch.arange(2)).check()
    with pytest.raises(ValueError, match="the data have no test classes, only those of train, val: add some"):
        data.episodes("test", torch.arange(2))


def test_resident_classes_hold_the_same_images_varied_already(classes):
    variants = [Turned(1), Sampled(v2.RandomHorizontalFlip(0.5), 7)]
    some = classes.select(torch.tensor([2, 0])).varied(variants)
    moved = some.resident(torch.device("meta"))
    assert {t.device.type for t in moved[:5]} == {"meta"}
    resident = some.resident(torch.device("cpu"))
    assert (len(resident.images), resident.variants) == (3 * (4 + 5), ())
    chosen = torch.arange(6).view(2, 3)
    members = torch.tensor([[0, 3], [2, 1], [3, 3]]).expand(2, 3, 2)
    assert torch.equal(resident.take(chosen, members), some.take(chosen, members))
    assert torch.equal(resident.counts, some.counts)


def test_on_device_is_refused_without_the_images_in_memory(classes):
    with pytest.raises(ValueError, match="image_transforms sample on the CPU: leave on_device out"):
        ImageDataModule(on_device=True, image_transforms=[v2.RandomHorizontalFlip()])
    data = ImageDataModule(ways=3, on_device=True)
    data.classes = {"train": classes._replace(images=Decoding(None, ["a"] * 13, ImageFormat(4, 4)))}
    with pytest.raises(ValueError, match=r"on_device=True needs the images in memory, .*: raise data.cache_gb, set"):
        data.setup()
