"""The estimators between first and second order, against products of explicit Jacobians."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from torch import nn
from torch.func import functional_call

from fomal.inner import SGD, SGLD, Adam
from fomal.inner.loop import InnerLoop
from fomal.inner.objective import Objective
from fomal.models import MLP
from fomal.outer import MAML, BinomialMAML, QueryFOMAML, TruncatedMAML
from fomal.tasks.episode import Episode
from fomal.tasks.sampler import minibatch_indices
from fomal.utils import tree
from tests.helpers.oracle import batches, loss_of

STEPS = 4


def regression(tasks=3, points=12, inputs=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tasks, 2 * points, inputs, generator=g, dtype=torch.float64)
    y = torch.randn(tasks, 2 * points, 1, generator=g, dtype=torch.float64) + x.sum(-1, keepdim=True)
    return Episode(x[:, :points], y[:, :points], x[:, points:], y[:, points:], torch.arange(tasks))


def inner_loop(network, optimizer, steps=STEPS, adapted=None, **settings):
    episode = regression()
    phi = tree.detach(dict(network.named_parameters()))
    indices = minibatch_indices(0, 0, episode.number, episode.support_x.shape[1], steps, 5)
    inner = InnerLoop(Objective(network, True), optimizer, optimizer.init(phi), indices, episode, adapted)
    return inner, phi


@pytest.fixture
def mlp():
    torch.manual_seed(0)
    return MLP(in_features=2, hidden=(3,)).double()


def flat(values):
    return torch.cat([v.detach().reshape(-1) for v in values])


def explicit_factors(inner, phi, lr, weight_decay, task):
    """-lr H_j (with the penalty's part) at each step of a loop written out, and the query gradient at the end."""
    network, names = inner.objective.network, list(phi)
    shapes = [phi[name].shape for name in names]

    def loss(vector, x, y):
        parts = torch.split(vector, [s.numel() for s in shapes])
        params = {name: p.view(s) for name, p, s in zip(names, parts, shapes, strict=True)}
        return loss_of(lambda x: functional_call(network, params, (x,)), x, y)

    w, factors = flat(phi.values()), []
    for x, y in zip(*batches(inner.episode, inner.indices, task), strict=True):
        hessian = torch.autograd.functional.hessian(lambda v, x=x, y=y: loss(v, x, y), w)
        factors.append(-lr * (hessian + weight_decay * torch.eye(len(w), dtype=w.dtype)))
        gradient = torch.func.grad(loss)(w, x, y)
        w = w - lr * (gradient + weight_decay * w)
    return factors, torch.func.grad(loss)(w, inner.episode.query_x[task], inner.episode.query_y[task])


def binomial(factors, gradient, order):
    """The sum over all choices of at most `order` steps of the product of their factors, earliest step leftmost."""
    total = gradient.clone()
    for degree in range(1, order + 1):
        for chosen in combinations(range(len(factors)), degree):
            term = gradient
            for step in reversed(chosen):
                term = factors[step] @ term
            total += term
    return total


def truncated(factors, gradient, order):
    for factor in reversed(factors[len(factors) - order :]):
        gradient = gradient + factor @ gradient
    return gradient


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("order", range(STEPS + 1))
@pytest.mark.parametrize(("rule", "formula"), [(TruncatedMAML, truncated), (BinomialMAML, binomial)])
def test_every_order_equals_the_product_of_explicit_jacobians(rule, formula, order, weight_decay, mlp):
    inner, phi = inner_loop(mlp, SGD(0.1, weight_decay=weight_decay))
    gradient, trajectory = rule(order)(inner, phi)
    expected = [formula(*explicit_factors(inner, phi, 0.1, weight_decay, t), order) for t in range(3)]
    torch.testing.assert_close(flat(gradient[n] for n in phi), torch.stack(expected).mean(0), rtol=1e-10, atol=1e-12)
    plain = inner.rollout(phi)
    torch.testing.assert_close(trajectory.losses, plain.losses)
    for name in phi:
        torch.testing.assert_close(trajectory.end[name], plain.end[name])
        assert not gradient[name].requires_grad


@pytest.mark.parametrize("optimizer", [SGD(0.1, momentum=0.5), Adam(0.01, eps_root=1e-6), SGLD(0.1, 1e-3)])
def test_truncation_at_its_ends_is_first_order_and_exact(optimizer, mlp):
    inner, phi = inner_loop(mlp, optimizer)
    for order, rule in ((0, QueryFOMAML()), (STEPS, MAML())):
        found, expected = TruncatedMAML(order)(inner, phi)[0], rule(inner, phi)[0]
        for name in phi:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("rule", [BinomialMAML, TruncatedMAML])
@pytest.mark.parametrize("vectorize", [True, False])
def test_the_highest_order_is_exact_with_convolutions_and_batch_norm(rule, vectorize, make_inner, network):
    phi = tree.detach(dict(network.named_parameters()))
    inner = make_inner(SGD(0.1), steps=STEPS)
    expected = MAML()(inner, phi)[0]
    inner.objective.vectorize = vectorize
    for name, value in rule(STEPS)(inner, phi)[0].items():
        torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-12)
        assert not value.requires_grad  # which would keep the whole graph alive


def test_on_a_convex_problem_the_error_falls_with_the_order_and_the_binomials_is_smaller():
    torch.manual_seed(0)
    network = nn.Linear(2, 1).double()
    inner, phi = inner_loop(network, SGD(0.05), steps=6)
    exact = flat(MAML()(inner, phi)[0].values())
    errors = {
        rule: [(flat(rule(order)(inner, phi)[0].values()) - exact).norm() for order in range(7)]
        for rule in (TruncatedMAML, BinomialMAML)
    }
    for rule in errors:
        assert all(later < earlier for earlier, later in zip(errors[rule], errors[rule][1:], strict=False))
        assert errors[rule][-1] < 1e-12 * exact.norm()
    for order in range(1, 6):
        assert errors[BinomialMAML][order] < 0.9 * errors[TruncatedMAML][order]


@pytest.mark.parametrize(
    ("rule", "optimizer", "message"),
    [
        (TruncatedMAML(5), SGD(), r"order=5 must be from 0 .* to model.train.steps=4 .*change one"),
        (BinomialMAML(-1), SGD(), r"order=-1 must be from 0"),
        (TruncatedMAML(1), Adam(), "TruncatedMAML differentiates through Adam.*use inner SGD"),
        (BinomialMAML(1), Adam(eps_root=1e-8), "inner_optimizer is Adam: use fomal.inner.SGD"),
        (BinomialMAML(1), SGD(momentum=0.9), "inner_optimizer is SGD with momentum"),
    ],
)
def test_orders_that_cannot_work_are_refused(rule, optimizer, message):
    with pytest.raises(ValueError, match=message):
        rule.check(STEPS, optimizer)
    TruncatedMAML(0).check(STEPS, Adam())  # first order asks nothing of the optimiser


# -- adapting a part of the parameters

HEAD = frozenset({"layers.3.weight", "layers.3.bias"})


@pytest.mark.parametrize("rule", [MAML(), TruncatedMAML(2), BinomialMAML(STEPS)], ids=["maml", "truncated", "binomial"])
def test_the_rest_of_the_parameters_is_learnt_through_the_inner_loop(rule, mlp):
    """Against autograd through a loop written out, in which the body is the same in every step."""
    inner, phi = inner_loop(mlp, SGD(0.1), adapted=HEAD)
    start = {name: p.clone().requires_grad_() for name, p in phi.items()}
    losses = []
    cut = STEPS - 2 if isinstance(rule, TruncatedMAML) else 0
    middles = []
    for t in range(3):
        params = dict(start)
        for number, (x, y) in enumerate(zip(*batches(inner.episode, inner.indices, t), strict=True)):
            if number == cut and cut:  # what comes before counts as given
                params = {n: p if n not in HEAD else p.detach().requires_grad_() for n, p in params.items()}
                middles.append(params)
            loss = loss_of(lambda x, params=params: functional_call(mlp, params, (x,)), x, y)
            gradients = torch.autograd.grad(loss, [params[n] for n in HEAD], create_graph=number >= cut)
            params = params | {n: params[n] - 0.1 * g for n, g in zip(HEAD, gradients, strict=True)}
        query = (inner.episode.query_x[t], inner.episode.query_y[t])
        losses.append(loss_of(lambda x, params=params: functional_call(mlp, params, (x,)), *query) / 3)
    sum(losses).backward()
    gradient, trajectory = rule(inner, phi)
    assert gradient.keys() == phi.keys()
    for name, p in start.items():
        expected = p.grad if name not in HEAD or not cut else sum(m[name].grad for m in middles)
        torch.testing.assert_close(gradient[name], expected, rtol=1e-9, atol=1e-12)
    for name in phi.keys() - HEAD:
        assert torch.equal(trajectory.end[name], phi[name].expand(3, *phi[name].shape))


def test_first_order_maml_learns_the_rest_from_the_query_gradient(mlp):
    inner, phi = inner_loop(mlp, SGD(0.1), adapted=HEAD)
    gradient = QueryFOMAML()(inner, phi)[0]
    binomial, truncated = BinomialMAML(0)(inner, phi)[0], TruncatedMAML(0)(inner, phi)[0]
    end = inner.rollout(phi).end
    for name in phi:
        torch.testing.assert_close(gradient[name], inner.query_gradients(end)[name].mean(0))
        torch.testing.assert_close(binomial[name], gradient[name])
        torch.testing.assert_close(truncated[name], gradient[name])
        assert gradient[name].abs().max() > 0
