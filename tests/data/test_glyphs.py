import pytest
import torch

from fomal.data.glyphs import GlyphDataModule, draw


def images(data, split, tasks):
    """Tasks 0 .. tasks - 1, class by class: (T, W, E, H, W) float in [0, 1]."""
    x = data.episodes(split, torch.arange(tasks)).check().support_x
    return data.preprocess(x).view(tasks, data.ways, -1, *x.shape[-2:])


def nearest_neighbour(tasks, **settings):
    """Accuracy of the nearest support image by Euclidean distance of pixels."""
    episode = GlyphDataModule(**settings).episodes("test", torch.arange(tasks))
    query, support = (x.flatten(2).float() for x in (episode.query_x, episode.support_x))
    return (torch.cdist(query, support).argmin(-1) == episode.query_y).float().mean().item()


@pytest.mark.parametrize(
    "settings", [{}, {"ways": 3, "image_size": 45, "strokes": 7, "train_shots": 2, "train_query_shots": 3}]
)
def test_episodes_are_a_function_of_seed_split_and_number(settings):
    data = GlyphDataModule(**settings)
    many = data.episodes("train", torch.arange(23))
    for number in ([7], [22, 7], [8, 7, 6, 5, 4], list(range(22, -1, -1))):
        few = GlyphDataModule(**settings).episodes("train", torch.tensor(number))
        assert torch.equal(few.support_x, many.support_x[number])
        assert torch.equal(few.query_x, many.query_x[number])


def test_every_class_of_every_stream_is_new():
    # Without wobble the examples of a class differ in their pen alone, so whatever has ink is the same in all of them.
    still = {"wobble": 0.0, "warp": 0.0, "shift": 0.0, "shots": 3, "train_shots": 3}
    data, other = GlyphDataModule(**still), GlyphDataModule(seed=1, **still)
    streams = [images(data, "train", 40), images(data, "val", 40), images(data, "test", 40), images(other, "test", 40)]
    written = torch.cat(streams).flatten(0, 1) < 0.9  # (classes, examples, H, W)
    overlap = (written[:, 0] & written[:, 1]).sum((1, 2)) / (written[:, 0] | written[:, 1]).sum((1, 2))
    assert overlap.min() > 0.7
    drawn = written[:, 0].flatten(1).float()
    both = drawn @ drawn.T
    overlap = both / (drawn.sum(1) + drawn.sum(1)[:, None] - both)
    assert overlap.fill_diagonal_(0).max() < 0.9
    assert 0.05 < overlap.mean() < 0.3


@pytest.mark.parametrize("workers", [1, 2])
def test_the_stream_does_not_depend_on_the_number_of_workers(workers):
    settings = {"shots": 2, "val_tasks": 11, "eval_tasks_per_batch": 3}
    alone = list(GlyphDataModule(**settings).val_dataloader())
    shared = list(GlyphDataModule(num_workers=workers, **settings).val_dataloader())
    assert [len(episode.number) for episode in shared] == [3, 3, 3, 2]
    for one, other in zip(alone, shared, strict=True):
        assert torch.equal(one.number, other.number)
        assert torch.equal(one.support_x, other.support_x)
        assert torch.equal(one.query_x, other.query_x)


def test_examples_of_a_class_are_nearer_to_each_other_than_to_other_classes():
    x = images(GlyphDataModule(shots=8), "test", 100).flatten(3)  # (T, W, E, pixels)
    distance = torch.cdist(x.flatten(1, 2), x.flatten(1, 2)).view(100, 5, 8, 5, 8)
    same = torch.eye(5, dtype=torch.bool)[:, None, :, None].expand(5, 8, 5, 8)
    within = distance[:, same].view(100, 5, 8, 8).sum((-1, -2)) / (8 * 7)  # (T, W)
    between = distance[:, ~same].view(100, 5, 8, 32).mean((-1, -2))
    assert within.min() > 0.5  # they are not copies
    assert within.mean() < 0.85 * between.mean()
    assert (within < between).float().mean() > 0.95


@pytest.mark.parametrize("size", [14, 28, 70])
def test_images_are_dark_ink_on_white(size):
    data = GlyphDataModule(image_size=size, shots=3)
    episode = data.episodes("val", torch.arange(60))
    assert episode.support_x.shape == (60, 15, 1, size, size)
    assert episode.support_x.dtype == torch.uint8
    x = data.preprocess(episode.support_x)
    assert x.dtype == torch.float32
    assert (x.min(), x.max()) == (0, 1)
    assert torch.equal((x * 255).round().to(torch.uint8), episode.support_x)
    assert x.amin((2, 3, 4)).max() < 0.5  # none is blank
    assert (x > 0.9).float().mean((2, 3, 4)).min() > 0.25  # none is filled
    assert 0.7 < x.mean() < 0.95
    rim = torch.cat([x[..., 0, :], x[..., -1, :], x[..., 0], x[..., -1]], -1)
    assert rim.mean() > 0.95


@pytest.mark.parametrize("size", [28, 70])
def test_ink_lies_along_the_curve_and_is_proportional_to_its_length(size):
    curves = torch.rand(50, 1, 3, 2, generator=torch.Generator().manual_seed(0)) * 0.6 + 0.2
    there = torch.ones(50, 1, dtype=torch.bool)
    x = draw(curves, there, torch.ones(50), size)
    # The distance of each pixel's centre from the curve, by trying 200 places on it.
    t = torch.linspace(0, 1, 200, dtype=torch.float64)[:, None]
    start, middle, end = curves[:, 0].double()[:, :, None].unbind(1)  # (50, 1, 2)
    curve = ((1 - t) ** 2 * start + 2 * t * (1 - t) * middle + t**2 * end) * size
    centre = (torch.arange(size, dtype=torch.float64) + 0.5).expand(size, size)
    pixels = torch.stack([centre, centre.T], -1).flatten(0, 1).expand(50, -1, 2)
    distance = torch.cdist(pixels, curve).amin(-1).view(50, size, size) / size
    assert (x[distance > 0.12] == 255).all()
    assert (x[distance < 0.012].float() < 192).float().mean() > 0.99
    # A pen so weak that no ink is lost where it is full.
    ink = (255 - draw(curves, there, torch.full((50,), 0.25), size).double()).sum((1, 2)) / 255
    length = curve.diff(dim=1).norm(dim=-1).sum(1)
    flat = (x > 0).all(2).all(1)  # no bend so sharp that the ink of its two sides adds up
    assert flat.sum() > 10
    assert torch.allclose(ink[flat], 0.25 * length[flat] * round(size / 14), rtol=0.03)


def test_missing_strokes_and_those_outside_leave_no_ink():
    curves = torch.rand(4, 2, 3, 2, generator=torch.Generator().manual_seed(0))
    curves[1] += torch.tensor([1.5, 0.0])
    curves[2] -= torch.tensor([0.0, 1.5])
    there = torch.tensor([[False, False], [True, True], [True, True], [True, True]])
    x = draw(curves, there, torch.full((4,), 2.0), 28)
    assert (x[:3] == 255).all()
    assert (x[3] < 64).any()


def test_difficulty_is_what_it_was_and_follows_its_settings():
    accuracy = nearest_neighbour(500)
    assert 0.62 < accuracy < 0.73  # measured on 2,000 tasks: 0.675 +- 0.009
    assert nearest_neighbour(200, wobble=0.0, warp=0.0, shift=0.0) > 0.97
    for harder in ({"wobble": 0.12}, {"warp": 0.4}, {"shift": 0.16}, {"ways": 10}):
        assert nearest_neighbour(500, **harder) < accuracy - 0.03


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ways": 1}, "ways=1 must be at least 2: with one class there is nothing to tell apart"),
        ({"strokes": 0}, "strokes=0 must be at least 1"),
        ({"image_size": 8}, "image_size=8 is too small to write in: use image_size >= 14"),
        ({"wobble": -0.1}, "wobble=-0.1 must not be negative"),
        ({"warp": -1.0}, "warp=-1.0 must not be negative"),
        ({"shift": float("nan")}, "shift=nan must not be negative"),
        ({"shots": 0}, "shots=0 must be at least 1"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        GlyphDataModule(**settings)


def test_unknown_split_is_refused():
    with pytest.raises(ValueError, match="split='dev' is unknown: use one of train, val, test"):
        GlyphDataModule().episodes("dev", torch.arange(2))
