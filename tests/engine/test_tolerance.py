"""Fast paths are judged against what rounding does to the network, and wrong ones are found all the same."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._C._functorch import get_interpreter_stack

from fomal.engine import tracing as traced
from fomal.engine.functional import full_precision
from fomal.engine.tracing import Tracer
from fomal.inner import SGD
from fomal.inner.objective import Objective
from fomal.learner.meta_learner import MetaLearner
from fomal.learner.settings import InnerSchedule
from fomal.models import BatchNorm
from fomal.outer import Reptile
from fomal.utils import tree
from tests.helpers.episodes import classification_episode

pytestmark = pytest.mark.traced


class Short(nn.Module):
    """Cannot be computed in float64."""

    def forward(self, x: Tensor) -> Tensor:
        return x.float()


def sensitive(*more: nn.Module) -> tuple[nn.Module, Any, Tensor, Tensor]:
    """A network that divides differences of its inputs, which are next to nothing beside these, by their size."""
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(2, 8, 3), BatchNorm(8, 1e-12), nn.Tanh(), nn.Flatten(), nn.Linear(8 * 36, 4))
    network = nn.Sequential(*more, *body)
    params = {name: p.detach() + 0.01 * torch.randn(3, *p.shape) for name, p in network.named_parameters()}
    return network, params, 1 + 1e-3 * torch.randn(3, 4, 2, 8, 8), torch.randint(4, (3, 4))


@pytest.mark.parametrize("more", [[], [Short()]], ids=["float64", "float32 alone"])
def test_a_sensitive_network_is_traced(more: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Its trace is off by more than a thousandth, as another order of the sums is in the plain functions."""
    network, params, x, y = sensitive(*more)
    tracer = Tracer(network, True)
    found = Objective(network, True, tracer).gradients(params, x, y)[0]
    expected = Objective(network, True).gradients(params, x, y)[0]
    error, scale = tree.difference(found, expected)
    assert 1e-3 < error / scale < 0.1
    assert tracer.is_on
    assert not caplog.records


@pytest.mark.parametrize(("more", "wrong"), [([], torch.float64), ([], torch.float32), ([Short()], torch.float32)])
def test_a_traces_that_is_wrong_is_found_even_so(
    more: Any, wrong: torch.dtype, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    honest = traced.make_trace

    def wrongly(*args: Any) -> Any:
        replay = honest(*args)
        change = lambda t: t * 1.04 if t.dtype == wrong else t  # noqa: E731
        return lambda leaves: torch.utils._pytree.tree_map(change, replay(leaves))

    monkeypatch.setattr(traced, "make_trace", wrongly)
    network, params, x, y = sensitive(*more)
    tracer = Tracer(network, True)
    found = Objective(network, True, tracer).gradients(params, x, y)
    assert not tracer.is_on
    assert "what is traced is off by" in caplog.text
    torch.testing.assert_close(found, Objective(network, True).gradients(params, x, y), rtol=0, atol=0)


class Off(nn.Module):
    """Right in a loop, and off by a share under vmap."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 1.04 if len(get_interpreter_stack() or ()) > 1 else x


@pytest.mark.parametrize("more", [[], [Short()]], ids=["float64", "float32 alone"])
@pytest.mark.parametrize("is_off", [False, True])
def test_what_is_vectorised_is_compared_with_the_loop(more: Any, is_off: bool, caplog: Any) -> None:
    network, params, x, y = sensitive(*more)
    if is_off:
        network.append(Off())
    objective = Objective(network)
    objective.settle({name: p[0] for name, p in params.items()}, x[:2], y[:2])
    assert objective.vectorize is not is_off
    if is_off:
        assert "its vectorised gradient is off by" in caplog.text
        assert "model.execution.vectorize: false says so beforehand" in caplog.text
    else:
        assert not caplog.records


def test_a_sensitive_network_is_vectorised_whatever_its_rounding() -> None:
    network, params, x, y = sensitive()
    objective = Objective(network)
    objective.settle({name: p[0] for name, p in params.items()}, 1 + 0.03 * (x[:2] - 1), y[:2])  # rounding is all
    assert objective.vectorize


def test_modes_of_modules_stay_as_they_are() -> None:
    network, params, x, y = sensitive()
    network[0].eval()
    Objective(network).settle({name: p[0] for name, p in params.items()}, x[:2], y[:2])
    assert [module.training for module in network] == [False, True, True, True, True]


@pytest.mark.parametrize("field", ["support_x", "query_x"])
def test_data_that_are_not_finite_are_named_and_not_called_a_network_that_cannot_be_vectorised(
    field: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(81, 3)).double()
    learner = MetaLearner(network, Reptile(), SGD(0.1), eval=InnerSchedule(1, 5))
    episode = classification_episode()._replace(split=2, number=torch.arange(40, 44))
    spoilt = {field: getattr(episode, field).clone()}
    spoilt[field][1, 0] = torch.nan
    with pytest.raises(ValueError, match=f"^the {field} of test episode 41 is not finite: mend the data"):
        learner.evaluate(episode._replace(**spoilt))
    result = learner.evaluate(episode)
    assert result.logits.isfinite().all()
    assert learner.objective.vectorize
    assert learner.objective.tracer.is_on
    assert not [record for record in caplog.records if record.name.startswith("fomal")]


def test_full_precision_is_for_a_while() -> None:
    parts: list[Any] = [torch.backends.cuda.matmul, torch.backends.cudnn.conv]
    before = [part.fp32_precision for part in parts]
    try:
        for part in parts:
            part.fp32_precision = "tf32"
        with full_precision(torch.device("cuda")):
            assert [part.fp32_precision for part in parts] == ["ieee", "ieee"]
        assert [part.fp32_precision for part in parts] == ["tf32", "tf32"]
    finally:
        for part, value in zip(parts, before, strict=True):
            part.fp32_precision = value
