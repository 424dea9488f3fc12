"""Batch norms: which are replaced, and which are left as they are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from fomal.inner import SGD
from fomal.learner.meta_learner import MetaLearner
from fomal.learner.settings import Execution, InnerSchedule
from fomal.models import BatchNorm
from fomal.models.norm import has_batch_norm, other_norms, use_batch_statistics
from fomal.outer import Reptile
from fomal.tasks.episode import Episode
from tests.helpers.episodes import classification_episode


class Own(nn.BatchNorm2d):
    """Has a forward and a parameter of its own."""

    def __init__(self, features: int, **settings: Any) -> None:
        super().__init__(features, **settings)
        self.gain = nn.Parameter(torch.full((1,), 3.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * super().forward(x)


class Same(nn.BatchNorm2d):
    """Has nothing of its own."""


def with_norm(norm: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), norm, nn.Flatten(), nn.Linear(4 * 49, 3))


def learner(network: nn.Module, **settings: Any) -> MetaLearner:
    return MetaLearner(network.double(), Reptile(), SGD(0.1), eval=InnerSchedule(2, 5), **settings)


@pytest.mark.parametrize("norm", [Own(4, track_running_stats=False), Same(4, track_running_stats=False)])
def test_a_subclass_keeps_its_forward_and_its_parameters(norm: nn.BatchNorm2d, recwarn: Any) -> None:
    network = with_norm(norm)
    own = learner(network)
    assert network[1] is norm
    found = own.evaluate(classification_episode())
    looped = learner(network, execution=Execution(vectorize=False)).evaluate(classification_episode())
    torch.testing.assert_close(found.logits, looped.logits, rtol=1e-9, atol=1e-11)
    assert own.objective.vectorize
    if isinstance(norm, Own):
        with torch.no_grad():
            norm.gain.fill_(1)
        assert not torch.allclose(own.evaluate(classification_episode()).logits, found.logits)
    assert not [w for w in recwarn if "left as written" in str(w.message)]


def test_a_subclass_with_running_averages_is_named() -> None:
    with pytest.warns(UserWarning, match=r"^1 \(Own\): left as written, with running averages, .*track_running_stats"):
        made = learner(with_norm(Own(4)))
    assert "network.1.gain" in made.state_dict()


@pytest.mark.parametrize("norm", [nn.InstanceNorm2d(4, track_running_stats=True)])
def test_other_norms_with_running_averages_are_named(norm: nn.Module) -> None:
    network = with_norm(norm)
    assert use_batch_statistics(network) == []
    assert other_norms(network) == ["1 (InstanceNorm2d)"]


@pytest.mark.parametrize("norm", [nn.GroupNorm(2, 4), nn.LayerNorm(7), nn.InstanceNorm2d(4), nn.LocalResponseNorm(2)])
def test_norms_without_are_left_and_not_named(norm: nn.Module) -> None:
    network = with_norm(norm)
    assert (use_batch_statistics(network), other_norms(network)) == ([], [])
    assert network[1] is norm


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = self.again = nn.BatchNorm2d(4)
        self.body = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), self.norm)
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(4 * 81, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.again(torch.tanh(self.norm(self.first(x))))))  # type: ignore[no-any-return]


def test_a_norm_in_several_places_stays_one() -> None:
    network = Shared()
    weight = network.norm.weight
    assert use_batch_statistics(network) == ["norm", "again", "body.1"]
    assert network.norm is network.again is network.body[1]
    assert network.norm.weight is weight
    expected = Shared().train()
    expected.load_state_dict(network.state_dict(), strict=False)
    x = torch.rand(5, 1, 9, 9)
    torch.testing.assert_close(network.eval()(x), expected(x))


@pytest.mark.parametrize("settings", [{"bias": False}, {"affine": False}, {}])
def test_a_replaced_norm_is_torchs_in_training(settings: Any) -> None:
    torch.manual_seed(0)
    network, expected = (nn.Sequential(nn.BatchNorm2d(4, 0.01, **settings)).double() for _ in range(2))
    for p in network.parameters():
        nn.init.uniform_(p)
    expected.load_state_dict(network.state_dict())
    use_batch_statistics(network)
    x = torch.rand(5, 4, 3, 3, dtype=torch.float64)
    torch.testing.assert_close(network.eval()(x), expected.train()(x))


def test_hooks_stay_and_parametrised_norms_are_left() -> None:
    network = nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm2d(4))
    network[0].register_forward_hook(lambda module, args, output: output + 1)
    parametrizations.weight_norm(network[1])
    assert use_batch_statistics(network) == ["0"]
    assert isinstance(network[0], BatchNorm)
    x = torch.rand(3, 4, 2, 2)
    torch.testing.assert_close(network[0](x).mean(), torch.tensor(1.0))
    assert other_norms(network) == ["1 (ParametrizedBatchNorm2d)"]
    assert has_batch_norm(network)


class Tokens(nn.Module):
    """Names each token by its own embedding."""

    def __init__(self, tokens: int = 40_000) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(tokens, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        assert not x.is_floating_point()
        return self.head(self.embed(x.long()).mean(1))  # type: ignore[no-any-return]


@pytest.mark.traced
@pytest.mark.parametrize("traced", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_token_ids_reach_the_network_as_they_are(dtype: torch.dtype, traced: bool) -> None:
    torch.manual_seed(0)
    network = Tokens().to(dtype)
    made = MetaLearner(network, Reptile(), SGD(0.1), eval=InnerSchedule(1, 3), execution=Execution(traced=traced))
    x = torch.tensor([[30001, 29952], [7, 30003], [39999, 2]])[None]
    y = torch.arange(3)[None]
    found = made.evaluate(Episode(x, y, x, y, torch.zeros(1, dtype=torch.int64), 3)).logits[0]
    assert made.objective.tracer.is_on is traced
    copy = Tokens().double()
    copy.load_state_dict(network.state_dict())
    loss = nn.functional.cross_entropy(copy(x[0]), y[0])
    loss.backward()
    with torch.no_grad():
        for p in copy.parameters():
            p -= 0.1 * p.grad
        tolerance = 0.03 if dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(found.double(), copy(x[0]), rtol=tolerance, atol=tolerance)
