"""Modules and parameters in several places of a network: one parameter each, whatever the rule and the execution."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fomal.engine.tracing import Tracer
from fomal.inner import SGD, Adam
from fomal.inner.loop import InnerLoop
from fomal.inner.objective import Objective
from fomal.learner.meta_learner import MetaLearner
from fomal.learner.settings import Execution, InnerSchedule, OuterStep
from fomal.models import resize_head
from fomal.models.parameters import buffers, matching, slots
from fomal.outer import FOMAML, MAML, BinomialMAML, QueryFOMAML, Reptile, TruncatedMAML
from fomal.tasks.episode import Episode
from fomal.tasks.sampler import minibatch_indices
from fomal.utils.tree import Tree, detach
from tests.helpers.learners import trainer

pytestmark = pytest.mark.traced

WAYS, WIDTH = 3, 4


class Twice(nn.Module):
    """Its layers have a name of their own and one in a container."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WAYS)
        self.net = nn.Sequential(self.body, nn.Tanh(), self.head)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)  # type: ignore[no-any-return]


class Deep(nn.Module):
    """Recurrent in depth."""

    def __init__(self) -> None:
        super().__init__()
        body = nn.Linear(WIDTH, WIDTH)
        self.layers = nn.Sequential(body, nn.Tanh(), body, nn.Tanh(), body)
        self.head = nn.Linear(WIDTH, WAYS)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.layers(x)))  # type: ignore[no-any-return]


class Siamese(nn.Module):
    """One encoder for both halves of the input, by two names."""

    def __init__(self) -> None:
        super().__init__()
        self.left = self.right = nn.Sequential(nn.Linear(WIDTH // 2, WIDTH), nn.Tanh())
        self.head = nn.Linear(WIDTH, WAYS)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.left(x[:, : WIDTH // 2]) * self.right(x[:, WIDTH // 2 :]))  # type: ignore[no-any-return]


class Tied(nn.Module):
    """Two layers with one weight and a bias each; a buffer in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.decode, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WAYS)
        self.decode.weight = self.encode.weight
        self.register_buffer("scale", torch.tensor([1.0, 2.0, 0.5, 1.5]))
        self.encode.register_buffer("scale", self.scale)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.encode(x) * self.encode.scale)
        return self.head(torch.tanh(self.decode(x) * self.scale))  # type: ignore[no-any-return]


def written_out(network: nn.Module, p: Tree, x: Tensor) -> Tensor:
    """What the networks above compute, of their parameters by their first names."""

    def layer(name: str, x: Tensor) -> Tensor:
        return F.linear(x, p[f"{name}.weight"], p[f"{name}.bias"])

    if isinstance(network, Twice):
        return layer("head", torch.tanh(layer("body", x)))
    if isinstance(network, Deep):
        for _ in range(3):
            x = torch.tanh(layer("layers.0", x))
        return layer("head", x)
    if isinstance(network, Siamese):
        left, right = (torch.tanh(layer("left.0", half)) for half in x.split(WIDTH // 2, 1))
        return layer("head", left * right)
    scale = network.get_buffer("scale")
    x = torch.tanh(layer("encode", x) * scale)
    return layer("head", torch.tanh(F.linear(x, p["encode.weight"], p["decode.bias"]) * scale))


NETWORKS = [Twice, Deep, Siamese, Tied]
STEPS, LR = 3, 0.3
RULES = [Reptile(), FOMAML(), QueryFOMAML(), MAML(), TruncatedMAML(1), BinomialMAML(STEPS)]  # the last is MAML


def expected(rule: Any, network: nn.Module, loop: InnerLoop, start: Tree) -> Tree:
    """The outer gradient by torch's autograd, task by task."""
    total = {name: torch.zeros_like(p) for name, p in start.items()}
    episode, tasks = loop.episode, loop.episode.tasks

    def loss(p: Tree, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(written_out(network, p, x), y)

    for t in range(tasks):
        path: list[Tree] = [{name: p.clone().requires_grad_() for name, p in start.items()}]
        for index in loop.indices:
            at = path[-1]
            batch = episode.support_x[t][index[t]], episode.support_y[t][index[t]]
            gradient = torch.autograd.grad(loss(at, *batch), list(at.values()), create_graph=True)
            path.append({name: p - LR * g for (name, p), g in zip(at.items(), gradient, strict=True)})
        query = loss(path[-1], episode.query_x[t], episode.query_y[t])
        if isinstance(rule, Reptile | FOMAML):
            before = path[0 if isinstance(rule, Reptile) else -2]
            found = [before[name] - p for name, p in path[-1].items()]
        else:
            by = {QueryFOMAML: -1, TruncatedMAML: -2}.get(type(rule), 0)
            found = list(torch.autograd.grad(query, list(path[by].values())))
        for name, g in zip(total, found, strict=True):
            total[name] += g.detach() / tasks
    return total


def problem(make: Any) -> tuple[nn.Module, Tree, Episode]:
    torch.manual_seed(0)
    network = make().double()
    labels = torch.arange(WAYS)
    x = torch.randn(2, 5 * WAYS, WIDTH, dtype=torch.float64)
    support, query = x.split([3 * WAYS, 2 * WAYS], 1)
    y = labels.repeat_interleave(3).expand(2, -1), labels.repeat_interleave(2).expand(2, -1)
    return network, detach(dict(network.named_parameters())), Episode(support, y[0], query, y[1], torch.arange(2), WAYS)


def loop_of(network: nn.Module, episode: Episode, execution: str) -> InnerLoop:
    tracer = Tracer(network, True) if execution == "traced" else None
    objective = Objective(network, execution != "looped", tracer)
    indices = minibatch_indices(0, 0, episode.number, episode.support_x.shape[1], STEPS, 4)
    return InnerLoop(objective, SGD(LR), {}, indices, episode)


@pytest.mark.parametrize("make", NETWORKS)
@pytest.mark.parametrize("execution", ["looped", "vectorised", "traced"])
def test_outer_gradients_are_those_of_one_parameter(make: Any, execution: str) -> None:
    network, start, episode = problem(make)
    before = dict(network.named_parameters(remove_duplicate=False))
    loop = loop_of(network, episode, execution)
    for rule in RULES if execution != "traced" else [Reptile(), MAML()]:
        wanted = expected(rule, network, loop, start)
        found = loop.traced(type(rule), rule, start)[0] if rule.differentiates else rule(loop, start)[0]
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-13)
    if loop.objective.tracer:
        assert loop.objective.tracer.is_on
        assert loop.objective.tracer.ways
    assert all(network.get_parameter(name) is p for name, p in before.items())  # nothing is left swapped
    for name, p in network.named_parameters():
        assert torch.equal(p, start[name])


@pytest.mark.parametrize("make", NETWORKS)
def test_evaluation_is_that_of_one_parameter_and_changes_none(make: Any) -> None:
    network, start, episode = problem(make)
    found = []
    for way in ("looped", "traced"):
        learner = MetaLearner(
            network, Reptile(), SGD(LR), eval=InnerSchedule(STEPS, 5), execution=Execution(traced=way == "traced")
        )
        learner.objective.vectorize = way == "traced"
        learner.objective.is_given = True
        with torch.no_grad():
            found.append(learner.evaluate(episode))
    indices = learner._minibatch_indices(episode, training=False)
    for t in range(2):
        p = {name: v.clone().requires_grad_() for name, v in start.items()}
        for index in indices:
            loss = F.cross_entropy(
                written_out(network, p, episode.support_x[t][index[t]]), episode.support_y[t][index[t]]
            )
            gradient = torch.autograd.grad(loss, list(p.values()))
            p = {n: (v - LR * g).detach().requires_grad_() for (n, v), g in zip(p.items(), gradient, strict=True)}
        logits = written_out(network, p, episode.query_x[t]).detach()
        for result in found:
            torch.testing.assert_close(result.logits[t], logits, rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(result.logits_transductive[t], logits, rtol=1e-10, atol=1e-12)
    assert all(torch.equal(p, start[name]) for name, p in network.named_parameters())


def test_a_run_keeps_ties_and_goes_on_from_its_checkpoint(tmp_path: Any) -> None:
    def fitted(steps: int, ckpt_path: Any = None) -> MetaLearner:
        network, _, episode = problem(Tied)
        learner = MetaLearner(network, Reptile(), Adam(0.01), train=InnerSchedule(2, 4), outer=OuterStep(final=1.0))
        run = trainer(steps, precision="64-true")
        run.fit(learner, torch.utils.data.DataLoader([episode] * 4, batch_size=None), ckpt_path=ckpt_path)
        run.save_checkpoint(tmp_path / "last.ckpt")
        return learner

    whole = fitted(4)
    assert whole.network.decode.weight is whole.network.encode.weight
    fitted(2)
    resumed = fitted(4, tmp_path / "last.ckpt")
    for name, value in whole.network.state_dict().items():
        assert torch.equal(resumed.network.state_dict()[name], value), name


def test_patterns_may_use_any_name_of_a_parameter() -> None:
    assert matching(Twice(), ["net.0.*"]) == {"body.weight", "body.bias"}
    assert matching(Twice(), ["*", "!net.2.*"]) == {"body.weight", "body.bias"}
    assert matching(Tied(), ["decode.*"]) == {"encode.weight", "decode.bias"}
    with pytest.raises(
        ValueError, match="'decod.*' matches no parameter; there are encode.weight, encode.bias, decode"
    ):
        matching(Tied(), ["decod.*"])


def test_places_and_first_names() -> None:
    assert slots(Tied())["decode.weight"] == "encode.weight"
    assert list(slots(Siamese())) == ["left.0.weight", "left.0.bias", "head.weight", "head.bias"]
    assert list(buffers(Tied())) == ["scale", "encode.scale"]


def test_a_shared_head_is_resized_in_both_places_and_a_tied_one_is_refused() -> None:
    network = Twice()
    assert resize_head(network, 5) == "head"
    assert network.head is network.net[2]
    assert network(torch.rand(2, WIDTH)).shape == (2, 5)
    tied = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH))
    tied[1].weight = tied[0].weight
    with pytest.raises(ValueError, match="the weight of '1' is also that of '0.weight' .tied"):
        resize_head(tied, 5)


def test_a_name_that_is_not_the_first_is_refused() -> None:
    network, _, episode = problem(Twice)
    every = {name: p.detach()[None] for name, p in network.named_parameters(remove_duplicate=False)}
    with pytest.raises(ValueError, match="'net.0.bias' is no parameter of Twice, or not its first name"):
        Objective(network, False).predict(every, episode.support_x[:1])


def test_a_copy_of_a_learner_has_its_own_ties_and_traces() -> None:
    network, _, episode = problem(Tied)
    learner = MetaLearner(network, Reptile(), SGD(LR), eval=InnerSchedule(1, 5), execution=Execution(traced=True))
    expected = learner.evaluate(episode).logits
    other = copy.deepcopy(learner)
    assert not other.objective.tracer.ways
    assert other.network.decode.weight is other.network.encode.weight
    torch.testing.assert_close(other.evaluate(episode).logits, expected, rtol=1e-10, atol=1e-12)
