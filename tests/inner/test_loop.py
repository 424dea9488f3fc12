import logging

import pytest
import torch
from torch import nn

from fomal.inner import SGD, Adam
from fomal.inner.objective import Objective
from fomal.utils import tree
from tests.helpers.oracle import adapt_one, batches

PAIRS = {
    "sgd": (SGD(0.1), lambda p: torch.optim.SGD(p, lr=0.1)),
    "momentum": (
        SGD(0.05, momentum=0.9, weight_decay=0.01),
        lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01),
    ),
    "released adam": (Adam(0.01), lambda p: torch.optim.Adam(p, lr=0.01, betas=(0.0, 0.999))),
    "adam": (
        Adam(0.01, beta1=0.9, beta2=0.99, eps=1e-6, weight_decay=0.02),
        lambda p: torch.optim.Adam(p, lr=0.01, betas=(0.9, 0.99), eps=1e-6, weight_decay=0.02),
    ),
}


@pytest.fixture
def phi(network):
    return tree.detach(dict(network.named_parameters()))


@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize("pair", PAIRS)
def test_rollout_equals_a_loop_with_torch_optim(pair, vectorize, network, episode, make_inner, phi):
    optimizer, make_torch = PAIRS[pair]
    inner = make_inner(optimizer, objective=Objective(network, vectorize))
    trajectory = inner.rollout(phi, step_weights=[0.5, 0.0, -1.0, 2.0])
    for t in range(episode.tasks):
        adapted, d, _ = adapt_one(network, make_torch, *batches(episode, inner.indices, t))
        for i, (name, p) in enumerate(adapted.named_parameters()):
            torch.testing.assert_close(trajectory.end[name][t], p.detach(), rtol=1e-10, atol=1e-12)
            weighted = 0.5 * d[0][i] - d[2][i] + 2 * d[3][i]
            torch.testing.assert_close(trajectory.combination[name][t], weighted, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("pair", ["momentum", "released adam", "adam"])
def test_carried_state_goes_on_where_torch_optim_left_off(pair, network, episode, make_inner, phi):
    optimizer, make_torch = PAIRS[pair]
    first = make_inner(optimizer)
    carried = first.mean_state(first.rollout(phi).state)
    second = make_inner(optimizer, state=carried).rollout(phi)
    states = [adapt_one(network, make_torch, *batches(episode, first.indices, t))[2].state_dict() for t in range(4)]
    average = states[0]
    for index, values in average["state"].items():  # each task starts from the mean of what the tasks left
        for key in values:
            if key != "step" and values[key] is not None:
                values[key] = torch.stack([s["state"][index][key] for s in states]).mean(0)
    for t in range(episode.tasks):
        adapted, _, _ = adapt_one(network, make_torch, *batches(episode, first.indices, t), state=average)
        for name, p in adapted.named_parameters():
            torch.testing.assert_close(second.end[name][t], p.detach(), rtol=1e-9, atol=1e-12)
    reset = make_inner(optimizer).rollout(phi)
    assert any((reset.end[name] - second.end[name]).abs().max() > 1e-4 for name in phi), (
        "carried must differ from reset"
    )


def test_adam_counts_the_steps_of_one_task_whatever_their_number(make_inner, phi):
    inner = make_inner(Adam(0.01), steps=3)
    state = inner.mean_state(inner.rollout(phi).state)
    assert state["shared"]["steps"] == 3
    again = inner.mean_state(make_inner(Adam(0.01), steps=3, state=state).rollout(phi).state)
    assert again["shared"]["steps"] == 6


def test_tasks_do_not_see_each_other(episode, make_inner, phi):
    together = make_inner(Adam(0.01)).rollout(phi).end
    one = make_inner(Adam(0.01))
    alone = (
        make_inner(
            Adam(0.01),
            episode=episode.select(torch.tensor([2])),
            indices=tuple(index[2:3] for index in one.indices),
        )
        .rollout(phi)
        .end
    )
    for name in phi:
        torch.testing.assert_close(alone[name][0], together[name][2], rtol=1e-10, atol=1e-13)


class DataDependent(nn.Module):
    """Cannot be vectorised: which layer is used depends on the data."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(81, 3), nn.Linear(81, 3)

    def forward(self, x):
        return self.a(x.flatten(1)) if x.mean() > 0.5 else self.b(x.flatten(1))


def test_a_network_that_cannot_be_vectorised_runs_task_by_task_and_says_so(episode, make_inner, caplog):
    network = DataDependent().double()
    phi = tree.detach(dict(network.named_parameters()))
    objective = Objective(network)
    with caplog.at_level(logging.WARNING):
        objective.settle(phi, episode.support_x[:2], episode.support_y[:2])
    assert objective.vectorize is False
    assert "DataDependent cannot be vectorised over tasks" in caplog.text
    inner = make_inner(SGD(0.1), objective=objective, state={})
    trajectory = inner.rollout(phi)
    for t in range(episode.tasks):
        adapted, _, _ = adapt_one(network, lambda p: torch.optim.SGD(p, lr=0.1), *batches(episode, inner.indices, t))
        for name, p in adapted.named_parameters():
            torch.testing.assert_close(trajectory.end[name][t], p.detach(), rtol=1e-10, atol=1e-12)


class OwnNorm(nn.Module):
    """Torch's batch norm called directly: right to first order under vmap, wrong to second."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(1, 4, 3), nn.Linear(196, 3)
        self.weight, self.bias = nn.Parameter(torch.ones(4)), nn.Parameter(torch.zeros(4))

    def forward(self, x):
        x = nn.functional.batch_norm(self.first(x), None, None, self.weight, self.bias, training=True)
        return self.last(torch.tanh(x).flatten(1))


class InPlaceNoise(nn.Module):
    """Random in training alone, in a form that vmap refuses."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(81, 3)

    def forward(self, x):
        x = x.flatten(1)
        if self.training:
            x = x * torch.empty(len(x), 1, dtype=x.dtype).bernoulli_(0.9)
        return self.head(x)


@pytest.mark.parametrize("training", [True, False])
def test_what_cannot_be_vectorised_in_training_alone_is_found_too(training, episode, caplog):
    network = InPlaceNoise().double().train(training)
    objective = Objective(network)
    params = {name: p.detach() for name, p in network.named_parameters()}
    objective.settle(params, episode.support_x[:2], episode.support_y[:2])
    assert objective.vectorize is (not training)
    assert ("cannot be vectorised" in caplog.text) is training
    assert network.training is training
    stacked = {name: torch.stack([p, p]) for name, p in params.items()}
    assert objective.losses(stacked, episode.support_x[:2], episode.support_y[:2]).isfinite().all()


@pytest.mark.parametrize(("second_order", "vectorize"), [(False, True), (True, False)])
def test_a_wrong_vectorised_second_derivative_is_found_where_it_matters(second_order, vectorize, episode, caplog):
    network = OwnNorm().double()
    objective = Objective(network)
    params = tree.detach(dict(network.named_parameters()))
    objective.settle(params, episode.support_x[:2], episode.support_y[:2], second_order)
    assert objective.vectorize is vectorize
    assert ("vectorised second derivative is off" in caplog.text) is second_order


def test_an_error_of_the_network_itself_is_not_hidden_by_the_fallback(episode):
    network = nn.Linear(5, 3).double()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        Objective(network).settle(dict(network.named_parameters()), episode.support_x[:2], episode.support_y[:2])


@pytest.mark.parametrize("vectorize", [True, False])
def test_prediction_alone_is_one_forward_pass_with_the_support(vectorize, network, episode, phi):
    objective = Objective(network, vectorize)
    params = tree.stack(phi, episode.tasks)
    alone = objective.predict_inductive(params, episode.support_x, episode.query_x)
    with torch.no_grad():
        for t in range(episode.tasks):
            for q in range(episode.query_x.shape[1]):
                expected = network(torch.cat([episode.support_x[t], episode.query_x[t, q : q + 1]]))[-1]
                torch.testing.assert_close(alone[t, q], expected)


def test_dropout_differs_between_tasks(episode):
    network = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(81, 3)).double()
    phi = tree.detach(dict(network.named_parameters()))
    same = episode.support_x[:1].expand(2, -1, -1, -1, -1)
    out = Objective(network, True).predict(tree.stack(phi, 2), same)
    assert not torch.equal(out[0], out[1])
