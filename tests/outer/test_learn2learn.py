"""learn2learn as an oracle: of what computes its outer gradients, only the network's forward pass is fomal's."""

import importlib
import importlib.util
import os

import pytest
import torch

from fomal.data import SinusoidDataModule
from fomal.inner import SGD
from fomal.models import MLP
from fomal.outer import MAML, QueryFOMAML
from fomal.utils import tree
from tests.helpers.episodes import SmallConv, classification_episode
from tests.helpers.oracle import batches, loss_of

LR = 0.1


@pytest.fixture(scope="module")
def l2l():
    """learn2learn, imported only here because that takes seconds; skips the test without it, but fails it in CI."""
    if importlib.util.find_spec("learn2learn") is None:
        reason = "needs learn2learn, which is not installed: use `uv sync --extra learn2learn`"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return importlib.import_module("learn2learn")


@pytest.fixture(params=["mlp", "conv4", "sine"])
def problem(request):
    torch.manual_seed(0)
    if request.param == "sine":
        episode = SinusoidDataModule(query_shots=6).episodes("val", torch.arange(4))
        return MLP(hidden=[16, 16]).double(), episode.floating(torch.float64)
    network = SmallConv() if request.param == "conv4" else MLP(81, 3, hidden=[8])
    return network.double(), classification_episode()


# What make_inner builds on.
@pytest.fixture
def network(problem):
    return problem[0]


@pytest.fixture
def episode(problem):
    return problem[1]


def outer_gradient(algorithm, episode, indices):
    """Clone, adapt, backward; learn2learn leaves the mean over tasks to its user."""
    algorithm.zero_grad()
    for t in range(episode.tasks):
        learner = algorithm.clone()
        for x, y in zip(*batches(episode, indices, t), strict=True):
            learner.adapt(loss_of(learner, x, y))
        loss = loss_of(learner, episode.query_x[t], episode.query_y[t])
        (loss / episode.tasks).backward()  # adds to the gradients
    return {name: p.grad.clone() for name, p in algorithm.module.named_parameters()}


@pytest.mark.parametrize("steps", [1, 5])
def test_maml_and_query_fomaml_equal_learn2learn(steps, l2l, network, episode, make_inner):
    inner = make_inner(SGD(LR), steps=steps)
    phi = tree.detach(dict(network.named_parameters()))
    exact, first_order = (
        outer_gradient(l2l.algorithms.MAML(network, LR, first_order=flag), episode, inner.indices)
        for flag in (False, True)
    )
    torch.testing.assert_close(MAML()(inner, phi)[0], exact, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(QueryFOMAML()(inner, phi)[0], first_order, rtol=1e-10, atol=1e-13)
    apart = tree.subtract(exact, first_order)
    assert all(apart[name].norm() > 0.01 * first_order[name].norm() for name in phi)
