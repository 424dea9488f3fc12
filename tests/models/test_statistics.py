"""Batch norm by the statistics of the support set, and by running averages, beside torch's own operations by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fomal.adaptation import Adapted
from fomal.adaptation.export import export
from fomal.data.images.image_format import ImageFormat
from fomal.inner import SGD
from fomal.learner.meta_learner import MetaLearner
from fomal.learner.settings import Execution, InnerSchedule
from fomal.models import BatchNorm, Classifier, Conv4, Normalized, ResNet12
from fomal.models.norm import statistics_of_first
from fomal.outer import MAML, BinomialMAML, QueryFOMAML, Reptile, TruncatedMAML
from fomal.utils.tree import Tree
from tests.helpers.episodes import classification_episode

LR, EPS = 0.1, 1e-3


def torch_network() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4, eps=EPS), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 49, 3)
    return nn.Sequential(*layers).double()


def with_running_averages() -> nn.Module:
    network = torch_network()
    norm = network[1]
    assert isinstance(norm, nn.BatchNorm2d)
    generator = torch.Generator().manual_seed(1)
    for t in (norm.running_mean, norm.running_var, norm.weight.data, norm.bias.data):
        assert t is not None
        t.copy_(torch.rand(4, generator=generator, dtype=torch.float64) + 0.1)
    return network


def learner(network: nn.Module, rule: Any = None, vectorize: bool | None = None) -> MetaLearner:
    whole, how = InnerSchedule(2, 12), Execution(vectorize=vectorize)  # the whole support set in each step
    return MetaLearner(network, rule or Reptile(), SGD(LR), train=whole, eval=whole, execution=how)


def by_hand(params: Tree, x: Tensor, norm: Any) -> Tensor:
    """The network's logits of x, normalised by `norm`, a function of what goes into the batch norm."""
    h = F.conv2d(x, params["0.weight"], params["0.bias"])
    h = norm(h) * params["1.weight"][:, None, None] + params["1.bias"][:, None, None]
    return F.linear(h.tanh().flatten(1), params["4.weight"], params["4.bias"])


def of(whole: Tensor) -> Any:
    """Normalise by mean and variance of `whole`, what goes into the batch norm of other examples."""
    mean, var = whole.mean((0, 2, 3)), whole.var((0, 2, 3), correction=0)
    return lambda h: (h - mean[:, None, None]) / (var[:, None, None] + EPS).sqrt()


def into(params: Tree, x: Tensor) -> Tensor:
    return F.conv2d(x, params["0.weight"], params["0.bias"])


def adapted_by_hand(params: Tree, x: Tensor, y: Tensor, norm_of: Any) -> Tree:
    """Two steps of gradient descent; `norm_of` makes the normalisation from parameters and the batch."""
    for _ in range(2):
        loss = F.cross_entropy(by_hand(params, x, norm_of(params, x)), y)
        gradients = torch.autograd.grad(loss, list(params.values()), create_graph=True)
        params = {name: p - LR * g for (name, p), g in zip(params.items(), gradients, strict=True)}
    return params


def start(network: nn.Module) -> Tree:
    """The parameters by the names that they have without a wrapper."""
    return {name.removeprefix("network."): p.detach().requires_grad_() for name, p in network.named_parameters()}


@pytest.mark.parametrize("vectorize", [None, False])
def test_queries_are_normalised_by_the_support_alone(vectorize: bool | None) -> None:
    network = Normalized(torch_network(), "support")
    own, episode = learner(network, vectorize=vectorize), classification_episode()
    found = own.evaluate(episode)
    torch.testing.assert_close(found.logits, found.logits_transductive, rtol=1e-9, atol=1e-11)
    for t in range(episode.tasks):
        x, y, queries = episode.support_x[t], episode.support_y[t], episode.query_x[t]
        params = adapted_by_hand(start(network), x, y, lambda params, x: of(into(params, x)))
        expected = by_hand(params, queries, of(into(params, x)))
        torch.testing.assert_close(found.logits[t], expected.detach(), rtol=1e-9, atol=1e-11)
    assert own.objective.vectorize is (vectorize is None)
    batch = learner(torch_network()).evaluate(episode)
    assert not torch.allclose(batch.logits, found.logits)


@pytest.mark.parametrize(
    "rule", [QueryFOMAML(), MAML(), TruncatedMAML(2), BinomialMAML(2)], ids=lambda rule: type(rule).__name__
)
def test_outer_gradients_go_through_the_statistics_of_the_support(rule: Any) -> None:
    network = Normalized(torch_network(), "support")
    own, episode = learner(network, rule), classification_episode()
    phi = own.initialisation()
    found = own.gradient_of(episode, phi, own.begun_state()).gradient
    total = {name: torch.zeros_like(p) for name, p in start(network).items()}
    for t in range(episode.tasks):
        x, y = episode.support_x[t], episode.support_y[t]
        params = start(network)
        end = adapted_by_hand(params, x, y, lambda params, x: of(into(params, x)))
        if isinstance(rule, QueryFOMAML):
            params = end = {name: p.detach().requires_grad_() for name, p in end.items()}
        loss = F.cross_entropy(by_hand(end, episode.query_x[t], of(into(end, x))), episode.query_y[t])
        for (name, sum_), g in zip(total.items(), torch.autograd.grad(loss, list(params.values())), strict=True):
            sum_.add_(g / episode.tasks)
            del name
    for name, g in total.items():
        torch.testing.assert_close(found[f"network.{name}"], g, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("vectorize", [None, False])
def test_running_averages_are_used_and_stay(vectorize: bool | None, recwarn: Any) -> None:
    plain = with_running_averages()
    norm = plain[1]
    assert isinstance(norm, nn.BatchNorm2d)
    mean, var = norm.running_mean, norm.running_var
    assert mean is not None
    assert var is not None
    kept = mean.clone(), var.clone()
    network = Normalized(plain, "running")
    own, episode = learner(network, vectorize=vectorize), classification_episode()
    found = own.evaluate(episode)

    def running(*_: Any) -> Any:
        return lambda h: (h - kept[0][:, None, None]) / (kept[1][:, None, None] + EPS).sqrt()

    for t in range(episode.tasks):
        params = adapted_by_hand(start(network), episode.support_x[t], episode.support_y[t], running)
        expected = by_hand(params, episode.query_x[t], running()).detach()
        for logits in (found.logits[t], found.logits_transductive[t]):
            torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-11)
    buffers = dict(network.named_buffers())
    assert torch.equal(buffers["network.1.running_mean"], kept[0])
    assert torch.equal(buffers["network.1.running_var"], kept[1])
    assert not [w for w in recwarn if "left as written" in str(w.message)]
    assert own.objective.vectorize is (vectorize is None)


def test_within_a_batch_support_is_batch() -> None:
    x = torch.randn(6, 4, 5, 5, dtype=torch.float64)
    batch, support = BatchNorm(4).double(), BatchNorm(4, statistics="support").double()
    torch.testing.assert_close(support(x), batch(x))
    with statistics_of_first(6):
        torch.testing.assert_close(support(x), batch(x))
    with statistics_of_first(4):
        assert torch.equal(support(x)[:4], support(torch.cat([x[:4], x[:2]]))[:4])
        torch.testing.assert_close(support(x)[:4], batch(x[:4]))
        assert torch.equal(batch(x), BatchNorm(4).double()(x))


def image_model() -> Adapted:
    torch.manual_seed(0)
    network = Conv4(3, image_size=9, filters=4, statistics="support")
    images = torch.randint(256, (6, 1, 9, 9), dtype=torch.uint8)
    return Adapted(network, ["a", "b", "c"], ImageFormat(9, 9, "gray"), images, torch.arange(6) % 3, {})


def test_what_is_said_of_an_image_depends_on_no_other(tmp_path: Path) -> None:
    model, images = image_model(), torch.randint(256, (5, 1, 9, 9), dtype=torch.uint8)
    found = model.predict_pixels(images).probabilities
    for transductive in (False, True):
        torch.testing.assert_close(model.predict_pixels(images, transductive).probabilities, found)
        torch.testing.assert_close(model.predict_pixels(images[:1], transductive).probabilities, found[:1])
    export(model, tmp_path / "model.pt2", "torch-export")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    torch.testing.assert_close(loaded(images), found, rtol=1e-4, atol=1e-5)


def test_shipped_networks_take_the_choice() -> None:
    for network in (
        Conv4(image_size=9, filters=2, statistics="support"),
        ResNet12(widths=(2, 2, 2, 2), statistics="support"),
        Classifier("torchvision.models.resnet18", statistics="support"),
    ):
        norms = [module for module in network.modules() if isinstance(module, BatchNorm)]
        assert norms
        assert {norm.statistics for norm in norms} == {"support"}
    running = Classifier("torchvision.models.resnet18", statistics="running")
    assert any(name.endswith("running_mean") for name, _ in running.named_buffers())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Normalized(nn.Linear(2, 2)), "statistics='support', but there is no batch norm in the network"),
        (lambda: Normalized(Conv4(), "running"), "statistics='running', but a batch norm has no running averages"),
        (lambda: Normalized(torch_network(), "none"), "statistics='none'"),  # type: ignore[arg-type]
        (lambda: Conv4(statistics="running"), "statistics='running'"),  # type: ignore[arg-type]
    ],
)
def test_what_cannot_be_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
