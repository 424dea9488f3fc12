import copy

import pytest
import torch
from torch.func import functional_call

from fomal.engine.chunking import peak_bytes
from fomal.inner import SGD, Adam
from fomal.inner.loop import InnerLoop, gather_examples
from fomal.inner.objective import Objective
from fomal.models import Conv4
from fomal.outer import FOMAML, MAML, QueryFOMAML, Reptile, StepCombination
from fomal.tasks.episode import Episode
from fomal.tasks.sampler import minibatch_indices
from fomal.utils import tree
from tests.helpers.oracle import adapt_one, batches, gradient_of


@pytest.fixture
def phi(network):
    return tree.detach(dict(network.named_parameters()))


def assert_trees_close(a, b, rtol=1e-9, atol=1e-12):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=rtol, atol=atol)


def test_reptile_with_outer_sgd_is_the_papers_interpolation(network, episode, make_inner, phi):
    inner = make_inner(Adam(0.01))
    gradient, _ = Reptile()(inner, phi)
    epsilon = 0.3
    moved = copy.deepcopy(network)
    optimizer = torch.optim.SGD(moved.parameters(), lr=epsilon)
    adapted = [
        adapt_one(
            network, lambda p: torch.optim.Adam(p, lr=0.01, betas=(0.0, 0.999)), *batches(episode, inner.indices, t)
        )[0]
        for t in range(4)
    ]
    for name, p in moved.named_parameters():
        p.grad = gradient[name]
    optimizer.step()
    for name, p in moved.named_parameters():
        mean = torch.stack([a.get_parameter(name).detach() for a in adapted]).mean(0)
        torch.testing.assert_close(p.detach(), phi[name] + epsilon * (mean - phi[name]), rtol=1e-10, atol=1e-12)


def test_reptile_under_sgd_is_lr_times_the_sum_of_gradients(make_inner, phi):
    inner = make_inner(SGD(0.05))
    gradient, _ = Reptile()(inner, phi)
    total = {name: torch.zeros_like(p) for name, p in phi.items()}
    for step, index in zip(inner.steps(phi), inner.indices, strict=True):
        x, y = gather_examples(inner.episode.support_x, index), gather_examples(inner.episode.support_y, index)
        for t in range(4):
            params = {name: p[t].clone().requires_grad_() for name, p in step.before.items()}
            loss = torch.nn.functional.cross_entropy(functional_call(inner.objective.network, params, (x[t],)), y[t])
            grads = torch.autograd.grad(loss, list(params.values()))
            for name, g in zip(params, grads, strict=True):
                total[name] += 0.05 * g / 4
    assert_trees_close(gradient, total)


@pytest.mark.parametrize("optimizer", [SGD(0.1, momentum=0.5), Adam(0.01)], ids=["sgd", "adam"])
def test_reptile_and_released_fomaml_are_step_combinations(optimizer, make_inner, phi):
    inner = make_inner(optimizer)
    assert_trees_close(Reptile()(inner, phi)[0], StepCombination([1, 1, 1, 1])(inner, phi)[0])
    assert_trees_close(FOMAML()(inner, phi)[0], StepCombination([0, 0, 0, 1])(inner, phi)[0])
    halves = StepCombination([0.5, 0.5, 0, 0])(inner, phi)[0]
    first, second = (StepCombination(w)(inner, phi)[0] for w in ([1, 0, 0, 0], [0, 1, 0, 0]))
    assert_trees_close(halves, {name: (first[name] + second[name]) / 2 for name in first})


def test_released_fomaml_is_the_last_displacement(network, episode, make_inner, phi):
    inner = make_inner(Adam(0.01))
    gradient, _ = FOMAML()(inner, phi)
    make = lambda p: torch.optim.Adam(p, lr=0.01, betas=(0.0, 0.999))  # noqa: E731
    last = [adapt_one(network, make, *batches(episode, inner.indices, t))[1][-1] for t in range(4)]
    for i, name in enumerate(phi):
        torch.testing.assert_close(gradient[name], -torch.stack([d[i] for d in last]).mean(0), rtol=1e-9, atol=1e-12)


def test_query_fomaml_is_the_raw_query_gradient_at_the_adapted_weights(network, episode, make_inner, phi):
    inner = make_inner(SGD(0.1))
    gradient, _ = QueryFOMAML()(inner, phi)
    grads = []
    for t in range(4):
        adapted, _, _ = adapt_one(network, lambda p: torch.optim.SGD(p, lr=0.1), *batches(episode, inner.indices, t))
        grads.append(gradient_of(adapted, episode.query_x[t], episode.query_y[t]))
    for i, name in enumerate(phi):
        torch.testing.assert_close(gradient[name], torch.stack([g[i] for g in grads]).mean(0), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize("optimizer", [SGD(0.1), Adam(0.01, eps_root=1e-6)], ids=["sgd", "adam"])
def test_maml_equals_finite_differences(optimizer, vectorize, make_inner, network, phi):
    inner = make_inner(optimizer, steps=3)
    inner.objective.vectorize = vectorize
    gradient, _ = MAML()(inner, phi)
    assert not any(g.requires_grad for g in gradient.values())
    generator = torch.Generator().manual_seed(1)
    direction = {name: torch.randn(p.shape, generator=generator, dtype=p.dtype) for name, p in phi.items()}

    def query_loss(h):
        return inner.query_losses(inner.rollout(tree.add_scaled(phi, direction, h)).end).mean()

    analytic = sum((gradient[name] * direction[name]).sum() for name in phi)
    h = 1e-6  # small, because a ReLU bends somewhere along any longer way
    numeric = (query_loss(h) - query_loss(-h)) / (2 * h)
    torch.testing.assert_close(analytic, numeric, rtol=1e-6, atol=1e-8)
    first_order = QueryFOMAML()(inner, phi)[0]
    assert any((gradient[name] - first_order[name]).abs().max() > 1e-3 * first_order[name].abs().max() for name in phi)


def test_maml_tends_to_fomaml_linearly_as_the_inner_step_size_goes_to_zero(make_inner, phi):
    def gap(lr):
        inner = make_inner(SGD(lr))
        exact, first = MAML()(inner, phi)[0], QueryFOMAML()(inner, phi)[0]
        return sum((exact[name] - first[name]).square().sum() for name in phi).sqrt()

    gaps = [gap(lr) for lr in (1e-3, 1e-4, 1e-5)]
    for larger, smaller in zip(gaps, gaps[1:], strict=False):
        assert 8 < larger / smaller < 12.5


@pytest.mark.parametrize(
    ("rule", "steps", "optimizer", "message"),
    [
        (Reptile(), 0, SGD(), "model.train.steps=0 leaves Reptile nothing"),
        (StepCombination([1, 1]), 3, SGD(), "weights has 2 entries, but model.train.steps=3"),
        (FOMAML(tail_shots=1), 1, SGD(), "model.train.steps=1 leaves no step before the separate tail"),
        (MAML(), 3, Adam(), "MAML differentiates through Adam.*use inner SGD, or set eps_root above 0"),
    ],
)
def test_settings_that_cannot_work_are_refused(rule, steps, optimizer, message):
    with pytest.raises(ValueError, match=message):
        rule.check(steps, optimizer)


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match=r"weights=\[0, 0\] are all zero"):
        StepCombination([0, 0])
    with pytest.raises(ValueError, match="tail_shots=0 must be at least 1"):
        FOMAML(tail_shots=0)


def peak_mib(rule, steps):
    """The most memory that tensors take at one time while `rule` goes through `steps` inner steps."""
    torch.manual_seed(0)
    network = Conv4(5, filters=8)
    x, y = torch.rand(4, 50, 1, 28, 28), torch.arange(5).repeat_interleave(10).expand(4, -1)
    episode = Episode(x, y, x[:, :25], y[:, :25], torch.arange(4), 5)
    phi = tree.detach(dict(network.named_parameters()))
    indices, optimizer = minibatch_indices(0, 0, episode.number, 50, steps, 50), SGD(0.01)
    inner = InnerLoop(Objective(network, True), optimizer, optimizer.init(phi), indices, episode)
    return peak_bytes(lambda: rule(inner, phi)) / 2**20


@pytest.mark.parametrize("rule", [Reptile(), FOMAML(), QueryFOMAML()])
def test_first_order_rules_hold_no_graph_across_inner_steps(rule):
    few = peak_mib(rule, 2)
    assert peak_mib(rule, 8) < 1.01 * few


def test_the_memory_check_would_notice_a_graph():
    few = peak_mib(MAML(), 2)
    assert peak_mib(MAML(), 8) > 2 * few
