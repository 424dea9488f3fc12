"""Losses against formulas written out, and every outer rule with each of them against a loop with autograd."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from fomal.engine.chunking import Chunks
from fomal.engine.tracing import Tracer
from fomal.evaluation.protocols import evaluate
from fomal.inner import (
    SGD,
    BinaryCrossEntropy,
    BradleyTerry,
    CrossEntropy,
    Elementwise,
    GaussianLikelihood,
    Huber,
    Loss,
    Quantile,
    SquaredError,
)
from fomal.inner.loop import InnerLoop
from fomal.inner.loss import check_loss, mean_over_examples
from fomal.inner.objective import Objective
from fomal.models import BatchNorm
from fomal.outer import FOMAML, MAML, BinomialMAML, QueryFOMAML, Reptile, StepCombination, TruncatedMAML
from fomal.tasks.episode import NO_TARGET, Episode
from fomal.tasks.sampler import minibatch_indices
from fomal.utils import tree
from tests.helpers.oracle import batches

TASKS, SUPPORT, QUERY, STEPS, LR = 2, 8, 5, 3, 0.3
Forward = Callable[[Tensor], Tensor]


class Smooth(Loss):
    """A loss of one's own, which looks at the network in two places: squared error and a penalty on its slope."""

    def __call__(self, forward: Forward, x: Tensor, y: Tensor) -> Tensor:
        slope = (forward(x + 0.1) - forward(x)) / 0.1
        return (forward(x) - y).square().sum(-1) + 0.5 * slope.square().sum(-1)


def tokens(forward: Forward, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(forward(x).flatten(0, 1), y.flatten(), ignore_index=NO_TARGET)


def preference(forward: Forward, x: Tensor, y: Tensor) -> Tensor:
    first, second = forward(x[:, 0]).squeeze(1), forward(x[:, 1]).squeeze(1)
    return -F.logsigmoid(torch.where(y == 0, first - second, second - first)).mean()


def pinball(forward: Forward, x: Tensor, y: Tensor) -> Tensor:
    z, total = forward(x), []
    for n, q in enumerate((0.1, 0.5, 0.8)):
        error = y - z[:, 2 * n : 2 * n + 2]
        total.append(torch.where(error > 0, q * error, (q - 1) * error))
    return torch.stack(total).mean()


def gaussian(forward: Forward, x: Tensor, y: Tensor) -> Tensor:
    z = forward(x)
    return -torch.distributions.Normal(z[:, :2], (z[:, 2:] / 2).exp()).log_prob(y).mean()


def smooth(forward: Forward, x: Tensor, y: Tensor) -> Tensor:
    return (forward(x) - y).square().sum() / len(x) + 0.5 * (
        (forward(x + 0.1) - forward(x)) / 0.1
    ).square().sum() / len(x)


class Case(NamedTuple):
    """A loss, the mean of it written out, the network's outputs and the kind of data."""

    loss: Loss | None
    plain: Callable[[Forward, Tensor, Tensor], Tensor]
    outputs: int
    data: str


WEIGHTS = [0.5, 2.0, 3.0]
CASES = {
    "labels": Case(None, lambda f, x, y: F.cross_entropy(f(x), y), 3, "labels"),
    "targets": Case(None, lambda f, x, y: (f(x) - y).square().mean(), 2, "targets"),
    "cross-entropy": Case(
        CrossEntropy(0.1, WEIGHTS),
        lambda f, x, y: F.cross_entropy(f(x), y, torch.tensor(WEIGHTS).double(), label_smoothing=0.1),
        3,
        "labels",
    ),
    "tokens": Case(CrossEntropy(), tokens, 3, "tokens"),
    "squared": Case(SquaredError(), lambda f, x, y: (f(x) - y).square().mean(), 2, "targets"),
    "huber": Case(Huber(0.7), lambda f, x, y: F.huber_loss(f(x), y, delta=0.7), 2, "targets"),
    "binary": Case(
        BinaryCrossEntropy([2.0, 0.5]),
        lambda f, x, y: F.binary_cross_entropy(
            f(x).sigmoid(), y, weight=torch.where(y == 1, torch.tensor([2.0, 0.5]).double(), 1.0)
        ),
        2,
        "several",
    ),
    "absolute": Case(Elementwise(nn.L1Loss()), lambda f, x, y: (f(x) - y).abs().mean(), 2, "targets"),
    "pairs": Case(BradleyTerry(), preference, 1, "pairs"),
    "quantile": Case(Quantile([0.1, 0.5, 0.8]), pinball, 6, "targets"),
    "gaussian": Case(GaussianLikelihood(), gaussian, 4, "targets"),
    "own": Case(Smooth(), smooth, 2, "targets"),
}
RULES = {
    "Reptile": Reptile(),
    "FOMAML": FOMAML(),
    "combination": StepCombination([0.5, -1.0, 2.0]),
    "QueryFOMAML": QueryFOMAML(),
    "MAML": MAML(),
    "truncated": TruncatedMAML(1),
    "binomial": BinomialMAML(STEPS),
}


def drawn(kind: str) -> Episode:
    g = torch.Generator().manual_seed(1)

    def examples(count: int) -> tuple[Tensor, Tensor]:
        shape = {"tokens": (4, 2), "pairs": (2, 2)}.get(kind, (2,))
        x = torch.randn(TASKS, count, *shape, generator=g, dtype=torch.float64)
        if kind in ("targets", "several"):
            y = torch.randn(TASKS, count, 2, generator=g, dtype=torch.float64)
            return x, (y > 0).double() if kind == "several" else y
        ways, places = (2 if kind == "pairs" else 3), (4,) if kind == "tokens" else ()
        y = torch.randint(ways, (TASKS, count, *places), generator=g)
        if kind == "tokens":  # some labels are left out, and all of one example
            y[:, :, 0] = torch.where(x[..., 0, 0] > 0, NO_TARGET, y[:, :, 0])
            y[:, 1] = NO_TARGET
        return x, y

    ways = {"labels": 3, "tokens": 3, "pairs": 2}.get(kind, 1)
    return Episode(*examples(SUPPORT), *examples(QUERY), torch.arange(TASKS), ways).check()


@cache
def network_for(outputs: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, outputs)).double()


def inner_loop(case: Case, vectorize: bool, tracer: Tracer | None = None, query: Loss | None = None) -> InnerLoop:
    network, episode = network_for(case.outputs), drawn(case.data)
    indices = minibatch_indices(0, 0, episode.number, SUPPORT, STEPS, 5)
    return InnerLoop(Objective(network, vectorize, tracer, case.loss, query), SGD(LR), {}, indices, episode)


@cache
def written_out(name: str, query_name: str) -> dict[str, dict[str, Tensor]]:
    """The outer gradient of each rule, by autograd through a loop over tasks and steps."""
    case, query_case = CASES[name], CASES[query_name]
    network, inner = network_for(case.outputs), inner_loop(case, False)
    names = [key for key, _ in network.named_parameters()]
    per_task = []
    for task in range(TASKS):
        phi = [p.detach().clone().requires_grad_() for p in network.parameters()]
        path, cut = [phi], []
        for x, y in zip(*batches(inner.episode, inner.indices, task), strict=True):

            def forward(x: Tensor, at: Any = path[-1]) -> Tensor:
                return functional_call(network, dict(zip(names, at, strict=True)), (x,))

            gradient = torch.autograd.grad(case.plain(forward, x, y), path[-1], create_graph=True)
            cut.append(path[-1])
            path.append([p - LR * g for p, g in zip(path[-1], gradient, strict=True)])
        end = dict(zip(names, path[-1], strict=True))
        loss = query_case.plain(
            lambda x, end=end: functional_call(network, end, (x,)),
            inner.episode.query_x[task],
            inner.episode.query_y[task],
        )
        moves = [[b - a for a, b in zip(*pair, strict=True)] for pair in zip(path, path[1:], strict=False)]
        exact = torch.autograd.grad(loss, phi, retain_graph=True)
        per_task.append(
            {
                "Reptile": [a - b for a, b in zip(phi, path[-1], strict=True)],
                "FOMAML": [-m for m in moves[-1]],
                "combination": [-0.5 * a + b - 2 * c for a, b, c in zip(*moves, strict=True)],
                "QueryFOMAML": torch.autograd.grad(loss, path[-1], retain_graph=True),
                "truncated": torch.autograd.grad(loss, path[-2], retain_graph=True),
                "MAML": exact,
                "binomial": exact,
            }
        )
    return {
        rule: {
            key: torch.stack([found[rule][place] for found in per_task]).mean(0).detach()
            for place, key in enumerate(names)
        }
        for rule in RULES
    }


def close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", CASES)
def test_every_rule_works_with_every_loss(name: str, rule: str) -> None:
    expected = written_out(name, name)[rule]
    assert max(value.abs().max() for value in expected.values()) > 1e-3
    for vectorize in (True, False):
        inner = inner_loop(CASES[name], vectorize)
        phi = tree.detach(dict(network_for(CASES[name].outputs).named_parameters()))
        close(RULES[rule](inner, phi)[0], expected)


@pytest.mark.traced
@pytest.mark.parametrize("name", ["cross-entropy", "tokens", "huber", "binary", "pairs", "quantile", "gaussian", "own"])
def test_what_is_traced_says_the_same(name: str, caplog: pytest.LogCaptureFixture) -> None:
    case = CASES[name]
    network = network_for(case.outputs)
    tracer = Tracer(network, True, losses=[] if case.loss is None else [case.loss])
    inner = inner_loop(case, True, tracer)
    phi = tree.detach(dict(network.named_parameters()))
    close(inner.traced("maml", RULES["MAML"], phi)[0], written_out(name, name)["MAML"])
    assert tracer.is_on
    assert len(tracer.ways) == 1
    assert not caplog.records


@pytest.mark.parametrize("rule", ["Reptile", "QueryFOMAML", "MAML", "truncated", "binomial"])
def test_the_query_sets_may_have_another_loss(rule: str) -> None:
    expected = written_out("absolute", "squared")[rule]
    for vectorize in (True, False):
        inner = inner_loop(CASES["absolute"], vectorize, query=SquaredError())
        phi = tree.detach(dict(network_for(2).named_parameters()))
        close(RULES[rule](inner, phi)[0], expected)
    x, y = inner.episode.query_x, inner.episode.query_y
    outputs = network_for(2)(x)
    torch.testing.assert_close(
        inner.query_losses(inner.expand_to_tasks(phi)), (outputs - y).square().mean((1, 2)).detach()
    )
    result = evaluate(inner, phi, Chunks(TASKS))
    torch.testing.assert_close(result.losses[:, 0], (outputs - y).square().mean((1, 2)).detach())


@pytest.mark.traced
def test_traces_of_one_loss_are_not_used_for_another() -> None:
    network = network_for(2)
    phi, episode = tree.stack(dict(network.named_parameters()), TASKS), drawn("targets")
    phi = tree.detach(phi)
    tracer = Tracer(network, True)
    x, y = episode.support_x, episode.support_y
    objective = Objective(network, True, tracer, Huber(0.7), Huber(0.2))
    for delta in (0.7, 0.2, 0.05):
        expected = torch.stack([F.huber_loss(network(x[t]), y[t], delta=delta) for t in range(TASKS)])
        if delta == 0.05:
            objective.loss.delta = delta
        part = objective.for_queries() if delta == 0.2 else objective
        torch.testing.assert_close(part.losses(phi, x, y), expected.detach())
    assert len(tracer.ways) == 3
    assert objective.losses_used() == Objective(network, loss=Huber(0.05), query_loss=Huber(0.2)).losses_used()
    assert objective.losses_used() != Objective(network, loss=Huber(0.2), query_loss=Huber(0.05)).losses_used()


class Counting(Loss):
    calls = 0

    def __call__(self, forward: Forward, x: Tensor, y: Tensor) -> Tensor:
        self.calls += 1
        return (forward(x) - y).square().mean(-1)


@pytest.mark.traced
@pytest.mark.parametrize(
    ("wanted", "message"),
    [(None, "Counting is not known to compute the same each time"), (True, "the loss changes its own attributes")],
)
def test_a_loss_that_might_do_something_else_each_time_is_not_traced(
    wanted: bool | None, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    loss, network, episode = Counting(), network_for(2), drawn("targets")
    tracer = Tracer(network, wanted, losses=[loss])
    phi = tree.detach(tree.stack(dict(network.named_parameters()), TASKS))
    x, y = episode.support_x, episode.support_y
    for _ in range(2):
        found = Objective(network, True, tracer, loss).losses(phi, x, y)
    torch.testing.assert_close(found, (network(x) - y).square().mean((1, 2)).detach())
    assert message in tracer.reason
    assert len(caplog.records) == 1


class Branches(Loss):
    def __call__(self, forward: Forward, x: Tensor, y: Tensor) -> Tensor:
        losses = (forward(x) - y).square().mean(-1)
        return losses if y.sum() > 0 else 2 * losses


@pytest.mark.parametrize("place", ["loss", "query_loss"])
def test_a_loss_that_cannot_be_vectorised_runs_in_a_loop_with_a_line(
    place: str, caplog: pytest.LogCaptureFixture
) -> None:
    network, episode = network_for(2), drawn("targets")
    objective = Objective(network, **{place: Branches()})
    query = (episode.query_x, episode.query_y) if place == "query_loss" else ()
    objective.settle(tree.detach(dict(network.named_parameters())), episode.support_x, episode.support_y, query=query)
    assert objective.vectorize is False
    (record,) = caplog.records
    assert record.getMessage().startswith("Sequential with Branches cannot be vectorised over tasks")


def test_predictions_of_pairs_are_judged_as_two_classes() -> None:
    inner = inner_loop(CASES["pairs"], True)
    phi = tree.detach(dict(network_for(1).named_parameters()))
    result = evaluate(inner, phi, Chunks(TASKS))
    end, (x, y) = inner.rollout(phi).end, (inner.episode.query_x, inner.episode.query_y)
    for t in range(TASKS):
        rewards = functional_call(network_for(1), {name: p[t] for name, p in end.items()}, (x[t],)).squeeze(-1)
        torch.testing.assert_close(result.logits[t], rewards)
        torch.testing.assert_close(result.logits_transductive[t], rewards)
        assert result.accuracy[t] == ((rewards[:, 1] > rewards[:, 0]).long() == y[t]).double().mean()


@pytest.mark.parametrize("vectorize", [True, False])
def test_parts_of_pairs_are_normalised_by_the_parts_of_the_supports(vectorize: bool) -> None:
    network = nn.Sequential(BatchNorm(3, eps=0.0, affine=False, statistics="support"), nn.Linear(3, 1)).double()
    params = {name: torch.stack([p.detach()] * 2) for name, p in network.named_parameters()}
    support_x, query_x = (torch.randn(2, n, 2, 3, dtype=torch.float64) for n in (6, 4))  # (T, n, 2, 3)
    y = torch.tensor([[0, 1, 1, 0]] * 2)
    objective = Objective(network, vectorize, None, BradleyTerry())
    support = objective.support_for(support_x, query_x)
    rewards = []
    for t in range(2):
        variance, mean = torch.var_mean(support_x[t].flatten(0, 1), 0, correction=0)
        rewards.append(network[1]((query_x[t] - mean) / variance.sqrt()).squeeze(-1))  # (Q, 2)
    torch.testing.assert_close(objective.predict(params, query_x, support), torch.stack(rewards))
    losses = torch.stack([F.cross_entropy(r, y[t]) for t, r in enumerate(rewards)])
    torch.testing.assert_close(objective.losses(params, query_x, y, support), losses)
    one_by_one = objective.losses_inductive(params, (support_x, y[:, :1].expand(-1, 6)), (query_x, y))
    torch.testing.assert_close(one_by_one, losses)


def test_an_accuracy_of_many_labels_leaves_out_those_that_are_none() -> None:
    inner = inner_loop(CASES["tokens"], True)
    phi = tree.detach(dict(network_for(3).named_parameters()))
    result = evaluate(inner, phi, Chunks(TASKS))
    assert result.logits.shape == (TASKS, QUERY, 4, 3)
    y = inner.episode.query_y
    for t in range(TASKS):
        given = y[t] != NO_TARGET
        right = (result.logits[t].argmax(-1) == y[t])[given].double().mean()
        assert 0 < given.sum() < given.numel()
        torch.testing.assert_close(result.accuracy[t], right)


def test_the_mean_over_examples_is_weighted_in_one_place() -> None:
    losses, weights = torch.tensor([1.0, 2.0, 6.0]), torch.tensor([1.0, 0.0, 3.0])
    assert mean_over_examples(losses, None) == 3
    assert mean_over_examples(losses, weights) == (1 + 18) / 4
    assert mean_over_examples(losses, weights == 3) == 6
    assert mean_over_examples(losses, torch.zeros(3)) == 0


@pytest.mark.parametrize("name", CASES)
def test_each_example_has_a_loss_of_its_own(name: str) -> None:
    """Which is that of a mini-batch of it alone, in 32 bits where it is computed in fewer."""
    case = CASES[name]
    if case.loss is None:
        return
    episode, network = drawn(case.data), network_for(case.outputs)
    x, y = episode.support_x[0], episode.support_y[0]
    check_loss(case.loss, network, x, y, episode.ways)
    losses, weights = case.loss(network, x, y), case.loss.weights(y)
    assert losses.shape == (SUPPORT,)
    for i in range(SUPPORT):
        if weights is None or weights[i] > 0:
            torch.testing.assert_close(losses[i], case.plain(network, x[i : i + 1], y[i : i + 1]))
        else:
            assert losses[i] == 0
    short = Objective(nn.Linear(2, 2).bfloat16()).losses(
        {"weight": torch.zeros(1, 2, 2), "bias": torch.full((1, 2), 1.0)},
        torch.zeros(1, 3, 2).bfloat16(),
        torch.full((1, 3, 2), 1.0 + 2**-7).bfloat16(),
    )
    assert short.dtype == torch.float32
    assert short == 2**-14


X, LABELS, TARGETS = torch.zeros(4, 2), torch.tensor([0, 1, 2, 0]), torch.zeros(4, 2)


def gives(*shape: int) -> Forward:
    return lambda x: torch.zeros(*shape)


class Broken(Loss):
    def __init__(self, give: Any) -> None:
        self.give = give

    def __call__(self, forward: Forward, x: Tensor, y: Tensor) -> Any:
        return self.give(forward(x), y)


class Unweighable(SquaredError):
    def weights(self, y: Tensor) -> Tensor:
        return torch.ones(len(y), 1)


@pytest.mark.parametrize(
    ("loss", "outputs", "x", "y", "ways", "message"),
    [
        (CrossEntropy(), (4, 2), X, LABELS, 3, "model.network returns (2,) per example, but data.ways=3: give the"),
        (CrossEntropy(), (4, 3), X, TARGETS, 1, "CrossEntropy needs int64 labels, but the data's targets are torch.f"),
        (CrossEntropy(0, [1, 2]), (4, 3), X, LABELS, 3, "class_weights of CrossEntropy has 2 entries, but data.ways=3"),
        (
            *(CrossEntropy(), (4, 3, 5), X, torch.zeros(4, 5).long(), 3),
            "model.network returns (3, 5) per example, but an example's labels are (5,) and data.ways=3: give outputs "
            "(5, 3), the classes last; of one-hot vectors take y.argmax(-1).",
        ),
        (
            SquaredError(),
            (4, 1),
            X,
            TARGETS,
            1,
            "model.network returns (1,) per example, but the data's targets are (2",
        ),
        (Huber(), (4, 3), X, LABELS, 3, "Huber needs floating-point targets, but the data's are torch.int64 labels"),
        (
            BinaryCrossEntropy(),
            (4, 2),
            X,
            TARGETS + 2,
            1,
            "BinaryCrossEntropy needs targets from 0 to 1, but the data h",
        ),
        (BinaryCrossEntropy([1, 2, 3]), (4, 2), X, TARGETS, 1, "pos_weight of BinaryCrossEntropy has 3 entries, but"),
        (Elementwise(nn.CosineEmbeddingLoss()), (4, 2), X, TARGETS, 1, "model.loss Elementwise fails on inputs"),
        (
            Quantile([0.1, 0.9]),
            (4, 2),
            X,
            TARGETS,
            1,
            "and Quantile has 2 outputs for each: give the network outputs (4,",
        ),
        (
            GaussianLikelihood(),
            (4, 2),
            X,
            TARGETS,
            1,
            "and GaussianLikelihood has 2 outputs for each: give the network",
        ),
        (BradleyTerry(), (8, 1), torch.zeros(4, 2, 3), LABELS, 3, "BradleyTerry needs one label of 2 for each pair"),
        (
            BradleyTerry(),
            (8, 1),
            torch.zeros(4, 3),
            LABELS % 2,
            2,
            "BradleyTerry needs pairs, but the data's inputs are",
        ),
        (
            BradleyTerry(),
            (8, 2),
            torch.zeros(4, 2, 3),
            LABELS % 2,
            2,
            "model.network returns (2,) for each of a pair: g",
        ),
        (
            Broken(lambda z, y: z.mean()),
            (4, 2),
            X,
            TARGETS,
            1,
            "model.loss Broken returns () for a mini-batch of 4 exam",
        ),
        (Broken(lambda z, y: z - y), (4, 2), X, TARGETS, 1, "model.loss Broken returns (4, 2) for a mini-batch of 4"),
        (Broken(lambda z, y: None), (4, 2), X, TARGETS, 1, "model.loss Broken returns NoneType for a mini-batch of 4"),
        (
            Broken(lambda z, y: y[:, 0] > 0),
            (4, 2),
            X,
            TARGETS,
            1,
            "model.loss Broken returns torch.bool: give floating",
        ),
        (
            Broken(lambda z, y: z @ y),
            (4, 2),
            X,
            TARGETS,
            1,
            "model.loss Broken fails on inputs (4, 2) of torch.float32 ",
        ),
        (Unweighable(), (4, 2), X, TARGETS, 1, "model.loss Unweighable has weights (4, 1) for a mini-batch of 4"),
    ],
)
def test_what_does_not_fit_is_named_with_value_and_remedy(
    loss: Loss, outputs: tuple[int, ...], x: Tensor, y: Tensor, ways: int, message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        check_loss(loss, gives(*outputs), x, y, ways)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CrossEntropy(label_smoothing=1), "label_smoothing=1 must be below 1"),
        (lambda: CrossEntropy(label_smoothing=-0.1), "label_smoothing=-0.1 must not be negative"),
        (lambda: CrossEntropy(class_weights=[1, 0]), "class_weights=[1, 0] must be above 0"),
        (lambda: CrossEntropy(class_weights=[]), "class_weights=[] must be above 0, one number at least"),
        (lambda: Huber(0), "delta=[0] must be above 0"),
        (lambda: Huber(math.nan), "delta=[nan] must be a list of finite numbers"),
        (lambda: BinaryCrossEntropy(-1.0), "pos_weight=[-1.0] must be above 0"),
        (lambda: Quantile(1), "q=1 must be between 0 and 1"),
        (lambda: Quantile([0.5, 0]), "q=[0.5, 0] must be above 0"),
        (lambda: Elementwise(nn.Linear(1, 1)), "loss=Linear of Elementwise has no reduction"),
        (
            lambda: Elementwise(nn.BCEWithLogitsLoss(torch.ones(2))),
            "loss=BCEWithLogitsLoss of Elementwise has tensors, w",
        ),
    ],
)
def test_settings_that_make_no_sense_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


def test_one_output_for_a_target_without_an_axis() -> None:
    y, z = torch.tensor([1.0, 2.0]), torch.tensor([[0.0, 1.0], [3.0, 2.0]])
    for loss, outputs, expected in (
        (Quantile(0.9), z[:, 0], [0.9, 0.1]),
        (Quantile([0.9, 0.1]), z, [0.45, 0.05]),
        (SquaredError(), z[:, 0], [1.0, 1.0]),
        (GaussianLikelihood(), torch.zeros(2, 2), [0.5 + 0.5 * math.log(2 * math.pi), 2 + 0.5 * math.log(2 * math.pi)]),
    ):
        check_loss(loss, lambda x, z=outputs: z, torch.zeros(2, 1), y, 1)
        torch.testing.assert_close(loss(lambda x, z=outputs: z, torch.zeros(2, 1), y), torch.tensor(expected))
