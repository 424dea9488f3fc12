import pytest
import torch

from fomal.data.augment import Turned
from fomal.data.images import ClassImages, ImageDataModule


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
