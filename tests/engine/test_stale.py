"""Nothing that was found of a network is used after the network has changed: traces, and how to run over tasks."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from fomal.engine.backend import MOST_CHANGES
from fomal.engine.tracing import Tracer
from fomal.inner import SGD
from fomal.inner.objective import Objective
from fomal.learner.meta_learner import MetaLearner
from fomal.learner.settings import Execution, InnerSchedule
from fomal.outer import Reptile
from fomal.utils.fingerprint import Snapshot, settings
from fomal.utils.tree import detach, stack
from tests.helpers.episodes import classification_episode

pytestmark = pytest.mark.traced


class Settings:
    def __init__(self) -> None:
        self.slope, self.scales = 0.1, [1.0, {"last": 2.0}]


class Network(nn.Module):
    """All that a forward may depend on."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(81, 5).requires_grad_(False)
        self.act = nn.LeakyReLU(0.3)
        self.head = nn.Linear(5, 3)
        self.register_buffer("shift", torch.ones(5))
        self.register_buffer("passing", torch.ones(5), persistent=False)
        self.plain = torch.ones(5)
        self.settings, self.scale = Settings(), 1.5

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.frozen(x.flatten(1))) * self.scale + self.shift * self.passing + self.plain
        x = F.leaky_relu(x - 3, self.settings.slope) * self.settings.scales[1]["last"]
        return self.head(-x if self.act.training else x)  # type: ignore[no-any-return]


@torch.no_grad()
def another_storage(t: Tensor) -> None:
    t.data = 3 * t.data.clone()


def replaced_forward(network: Any) -> None:
    network.act.forward = types.MethodType(lambda self, x: x.square(), network.act)


def doubled(module: Any, args: Any, output: Any) -> Any:
    return 2 * output


CHANGES: dict[str, Callable[[Any], Any]] = {
    "a frozen layer": lambda n: setattr(n, "frozen", nn.Linear(81, 5).double().requires_grad_(False)),
    "an activation": lambda n: setattr(n, "act", nn.Tanh()),
    "its setting": lambda n: setattr(n.act, "negative_slope", 0.7),
    "a parameter object": lambda n: setattr(n.frozen, "bias", nn.Parameter(torch.ones(5).double(), False)),
    "a parameter's storage": lambda n: another_storage(n.frozen.weight),
    "a parameter in place": lambda n: n.frozen.weight.mul_(2),
    "a parameter taken out": lambda n: setattr(n.frozen, "bias", None),
    "a buffer": lambda n: setattr(n, "shift", torch.full((5,), 3.0).double()),
    "a buffer's storage": lambda n: another_storage(n.shift),
    "a buffer in place": lambda n: n.shift.fill_(4),
    "a buffer that is not saved": lambda n: n.passing.fill_(4),
    "a tensor": lambda n: setattr(n, "plain", torch.full((5,), 2.0).double()),
    "a tensor in place": lambda n: n.plain.fill_(5),
    "a number": lambda n: setattr(n, "scale", 2.5),
    "a setting of an object": lambda n: setattr(n.settings, "slope", 0.9),
    "a setting within a list": lambda n: n.settings.scales[1].update(last=4.0),
    "a mode of one module": lambda n: n.act.eval(),
    "a hook": lambda n: n.act.register_forward_hook(doubled),
    "a hook before": lambda n: n.head.register_forward_pre_hook(lambda module, args: (3 * args[0],)),
    "a hook on the whole": lambda n: n.register_forward_hook(doubled),
    "a parametrization": lambda n: parametrizations.weight_norm(n.frozen).parametrizations.weight.original0.mul_(3),
    "a forward": replaced_forward,
}


@pytest.fixture(scope="module")
def parts() -> Any:
    torch.manual_seed(0)
    network = Network().double()
    network.plain = network.plain.double()
    return network.state_dict()


def made(parts: Any) -> Any:
    network = Network().double()
    network.plain = network.plain.double()
    network.load_state_dict(parts)
    return network


def adapted(network: nn.Module, tracer: Tracer | None) -> Tensor:
    params = {n: p for n, p in detach(dict(network.named_parameters())).items() if n.startswith("head")}
    episode = classification_episode()
    with torch.no_grad():
        return Objective(network, True, tracer).predict(stack(params, episode.tasks), episode.support_x)


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen_by_traces(change: str, parts: Any) -> None:
    network = made(parts)
    tracer = Tracer(network, True)
    before = adapted(network, tracer)
    torch.testing.assert_close(before, adapted(network, None), rtol=1e-12, atol=1e-12)
    assert tracer.ways
    with torch.no_grad():
        CHANGES[change](network)
    expected = adapted(network, None)
    assert (expected - before).norm() > 1e-2 * before.norm()
    for _ in range(2):
        torch.testing.assert_close(adapted(network, tracer), expected, rtol=1e-12, atol=1e-12)
    assert tracer.is_on is ("hook" not in change)


@pytest.fixture
def hooked() -> Iterator[None]:
    handle = nn.modules.module.register_module_forward_hook(doubled)
    yield
    handle.remove()


def test_hooks_of_all_modules_are_seen(parts: Any, request: pytest.FixtureRequest) -> None:
    network = made(parts)
    tracer = Tracer(network, True)
    adapted(network, tracer)
    request.getfixturevalue("hooked")
    torch.testing.assert_close(adapted(network, tracer), adapted(network, None), rtol=1e-12, atol=1e-12)
    assert not tracer.is_on


def test_a_changed_class_is_seen(parts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    network = made(parts)
    tracer = Tracer(network, True)
    adapted(network, tracer)
    monkeypatch.setattr(nn.LeakyReLU, "forward", lambda self, x: x.square())
    torch.testing.assert_close(adapted(network, tracer), adapted(network, None), rtol=1e-12, atol=1e-12)


def test_what_is_unchanged_is_traced_once(parts: Any) -> None:
    network = made(parts)
    tracer = Tracer(network, True)
    for mode in (True, False, True, False):
        network.train(mode)
        adapted(network, tracer)
    assert len(tracer.ways) == 2
    assert tracer.changes == 0


def test_a_network_that_changes_all_the_time_is_traced_no_more(parts: Any, caplog: pytest.LogCaptureFixture) -> None:
    network = made(parts)
    tracer = Tracer(network, True)
    tracer.changes = MOST_CHANGES - 1
    adapted(network, tracer)
    network.scale = 7.0
    torch.testing.assert_close(adapted(network, tracer), adapted(network, None), rtol=1e-12, atol=1e-12)
    assert "it has changed 20 times, and is traced again after each change" in caplog.text
    assert not tracer.is_on


class Counting(nn.Module):
    """Changes itself: in an attribute, or in a buffer."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.head, self.kind, self.calls = nn.Linear(81, 3), kind, 0
        self.register_buffer("total", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "attribute":
            self.calls += 1
        elif self.kind == "buffer":
            self.total += 1
        return self.head(x.flatten(1))  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", ["attribute", "buffer"])
def test_a_forward_that_changes_its_network_is_not_traced(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    network = Counting(kind).double()
    tracer = Tracer(network, True)
    adapted(network, tracer)
    assert "its forward changes its own attributes or buffers, as a trace would once only" in caplog.text
    assert not tracer.is_on


def test_how_to_run_over_tasks_is_decided_again_where_the_network_has_changed(caplog: Any) -> None:
    class Branch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(81, 3), nn.Tanh()).double()
    learner = MetaLearner(network, Reptile(), SGD(0.1), eval=InnerSchedule(1, 5), execution=Execution(traced=False))
    episode = classification_episode()
    learner.evaluate(episode)
    assert learner.objective.vectorize is True
    network[2] = Branch()
    found = learner.evaluate(episode)
    assert learner.objective.vectorize is False
    assert "cannot be vectorised over tasks" in caplog.text
    fresh = MetaLearner(network, Reptile(), SGD(0.1), eval=InnerSchedule(1, 5), execution=Execution(vectorize=False))
    torch.testing.assert_close(found.logits, fresh.evaluate(episode).logits)


def test_a_forward_that_changes_its_network_is_settled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    learner = MetaLearner(
        Counting("attribute").double(), Reptile(), SGD(0.1), eval=InnerSchedule(1, 5), execution=Execution(traced=False)
    )
    settled: list[int] = []
    settle = Objective.settle
    monkeypatch.setattr(Objective, "settle", lambda self, *args: (settled.append(1), settle(self, *args)))
    for _ in range(3):
        learner.evaluate(classification_episode())
    assert len(settled) == 1


def test_a_forward_that_changes_a_buffer_is_refused() -> None:
    learner = MetaLearner(Counting("buffer").double(), Reptile(), SGD(0.1), eval=InnerSchedule(1, 5))
    with pytest.raises(
        ValueError, match="the forward of model.network changes its buffer 'total' in place, as running"
    ):
        learner.evaluate(classification_episode())


class Rule:
    def __init__(self) -> None:
        self.weights, self.settings, self.tensor, self.call = [0.1, 0.2], Settings(), torch.zeros(2000), lambda: 0


def test_settings_are_told_apart_by_what_is_in_them() -> None:
    rule = Rule()
    before = settings(rule)
    assert settings(rule) == before
    assert hash(settings(rule)) == hash(before)
    for change in (
        lambda: rule.weights.append(0.3),
        lambda: setattr(rule.settings, "slope", 0.2),
        lambda: rule.settings.scales[1].update(last=3.0),
        lambda: rule.tensor[1000].fill_(1),
        lambda: setattr(rule, "tensor", torch.zeros(2000)),
        lambda: setattr(rule, "call", lambda: 1),
        lambda: setattr(rule, "more", torch.nan),
    ):
        change()
        assert settings(rule) != before
        before = settings(rule)
        assert settings(rule) == before
    assert settings(SGD(0.1)) == settings(SGD(0.1)) != settings(SGD(0.2))


def test_memory_is_told_apart_where_that_is_asked_for() -> None:
    network = nn.Linear(2, 3)
    seen, plain = Snapshot(network, storages=True), Snapshot(network)
    assert seen == Snapshot(network, storages=True) == seen.now()
    with torch.no_grad():
        network.weight.add_(1)
    assert seen == seen.now()
    another_storage(network.weight)
    assert seen != seen.now()
    assert plain.now() is plain
