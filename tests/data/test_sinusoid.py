import math

import pytest
import torch

from fomal.data.sinusoid import SinusoidDataModule
from fomal.tasks.philox import uniform
from fomal.tasks.sampler import task_words


def test_targets_are_sines_of_the_stated_distribution():
    data = SinusoidDataModule(train_shots=6, train_query_shots=3)
    number = torch.arange(4000)
    episode = data.episodes("train", number).check()
    assert episode.support_x.shape == episode.support_y.shape == (4000, 6, 1)
    assert episode.query_x.shape == (4000, 3, 1)
    # Recover amplitude and phase by least squares on sin and cos: an oracle that knows nothing of the generator.
    x, y = (
        torch.cat(parts, 1).double()
        for parts in ((episode.support_x, episode.query_x), (episode.support_y, episode.query_y))
    )
    design = torch.cat([x.sin(), x.cos()], -1)  # y = a cos(b) sin(x) + a sin(b) cos(x)
    solution = torch.linalg.lstsq(design, y).solution  # (T, 2, 1)
    assert (design @ solution - y).abs().max() < 1e-4
    amplitude = solution.square().sum(1).sqrt().flatten()
    phase = torch.atan2(solution[:, 1, 0], solution[:, 0, 0]) % (2 * math.pi)
    assert amplitude.min() > 0.099
    assert amplitude.max() < 5.001
    assert abs(amplitude.mean() - 2.55) < 4 * 4.9 / 12**0.5 / 4000**0.5
    assert abs(phase.mean() - math.pi) < 4 * 2 * math.pi / 12**0.5 / 4000**0.5
    assert x.min() >= -5
    assert x.max() < 5
    assert abs(x.mean()) < 4 * 10 / 12**0.5 / x.numel() ** 0.5


def test_evaluation_is_judged_over_the_whole_interval():
    episode = SinusoidDataModule(query_shots=11).episodes("test", torch.arange(3))
    assert torch.allclose(episode.query_x[1, :, 0], torch.linspace(-5, 5, 11))


def test_episodes_are_a_function_of_seed_split_and_number():
    data = SinusoidDataModule()
    many, one = data.episodes("train", torch.arange(10)), data.episodes("train", torch.tensor([7]))
    assert torch.equal(many.support_y[7], one.support_y[0])
    assert not torch.equal(data.episodes("val", torch.tensor([7])).support_y, one.support_y)
    assert not torch.equal(SinusoidDataModule(seed=1).episodes("train", torch.tensor([7])).support_y, one.support_y)
    words = task_words(0, 0, torch.tensor([7]), 2)
    expected = uniform(words[:, :1], 0.1, 5.0) * torch.sin(
        one.support_x[..., 0] + uniform(words[:, 1:2], 0, 2 * math.pi)
    )
    assert torch.allclose(one.support_y[..., 0], expected.float(), atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shots": 0}, "shots=0 must be at least 1"),
        ({"query_shots": 1}, "query_shots=1 must be at least 2"),
        ({"train_query_shots": -1}, "train_query_shots=-1 must not be negative"),
        ({"meta_batch_size": 0}, "meta_batch_size=0 must be at least 1"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        SinusoidDataModule(**settings)


def test_unknown_split_is_refused():
    with pytest.raises(ValueError, match="split='dev' is unknown: use one of train, val, test"):
        SinusoidDataModule().episodes("dev", torch.arange(2))
