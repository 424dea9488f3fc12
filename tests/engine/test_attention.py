"""Networks with attention: vectorised, traced, and differentiated twice."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fomal.inner import SGD
from fomal.inner.loop import InnerLoop
from fomal.inner.objective import Objective
from fomal.learner.meta_learner import MetaLearner
from fomal.learner.settings import Execution, InnerSchedule
from fomal.outer import MAML, BinomialMAML, OuterRule, QueryFOMAML, TruncatedMAML
from fomal.outer.meta_gradient import meta_gradient
from fomal.tasks.episode import Episode
from fomal.tasks.sampler import minibatch_indices
from fomal.utils import tree

pytestmark = pytest.mark.traced


class Attends(nn.Module):
    """(B, L, 4) to (B, 3), by every way to attention that torch has."""

    def __init__(self, encoder: bool = False) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(4, 8), nn.Linear(8, 3)
        self.own = nn.MultiheadAttention(8, 2, batch_first=True)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True) if encoder else nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + F.scaled_dot_product_attention(x, x, x) + self.own(x, x, x)[0]
        return self.head(self.layer(x).mean(1))  # type: ignore[no-any-return]


def problem(encoder: bool = False) -> tuple[nn.Module, Episode]:
    torch.manual_seed(0)
    x, y = torch.randn(2, 12, 5, 4, dtype=torch.float64), torch.arange(3).repeat(2, 4)
    episode = Episode(x[:, :6], y[:, :6], x[:, 6:], y[:, 6:], torch.arange(2), 3)
    return Attends(encoder).double(), episode


@pytest.mark.parametrize("encoder", [False, True])
@pytest.mark.parametrize("rule", [MAML(), TruncatedMAML(2), BinomialMAML(2), QueryFOMAML()])
def test_rules_go_through_attention(rule: OuterRule, encoder: bool) -> None:
    """The gradient along a direction is the difference quotient, or for the first-order rule that of the loop."""
    network, episode = problem(encoder)
    phi = tree.detach(dict(network.named_parameters()))
    indices = minibatch_indices(0, 0, episode.number, 6, 2, 4)
    made: list[Any] = []
    for vectorize in (None, False):
        objective = Objective(network, vectorize)
        objective.settle(phi, episode.support_x, episode.support_y, second_order=rule.differentiates)
        inner = InnerLoop(objective, SGD(0.1), {}, indices, episode)
        made.append((objective, inner, meta_gradient(rule, inner, phi, skip=False).gradient))
    (objective, inner, found), (_, _, looped) = made
    # Under vmap torch's layer norm has a wrong second derivative, which is found.
    assert objective.vectorize is not (encoder and rule.differentiates)
    for name, value in looped.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-11)
    if not rule.differentiates:
        return
    direction = {name: torch.randn_like(p) for name, p in phi.items()}

    def loss(h: float) -> Tensor:
        return inner.query_losses(inner.rollout(tree.add_scaled(phi, direction, h)).end).mean()

    numeric = (loss(1e-5) - loss(-1e-5)) / 2e-5
    analytic = torch.stack([(found[name] * direction[name]).sum() for name in phi]).sum()
    torch.testing.assert_close(analytic, numeric, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("traced", [True, False])
@pytest.mark.parametrize(("rule", "encoder"), [(MAML(), False), (QueryFOMAML(), True)])
def test_training_and_evaluation_are_vectorised_without_a_warning(rule: OuterRule, encoder: bool, traced: bool) -> None:
    network, episode = problem(encoder)
    results = []
    for vectorize in (None, False):
        steps = {"train": InnerSchedule(1), "eval": InnerSchedule(2, 5)}
        learner = MetaLearner(network, rule, SGD(0.1), execution=Execution(vectorize=vectorize, traced=traced), **steps)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="There is a performance drop")
            phi = learner.initialisation()
            gradient = learner.gradient_of(episode, phi, learner.begun_state()).gradient
            with torch.no_grad():
                results.append((gradient, learner.eval().evaluate(episode)))
        if vectorize is None:
            assert learner.objective.vectorize
            assert learner.objective.tracer.is_on is traced
    (gradient, result), (wanted_gradient, wanted_result) = results
    for name, value in wanted_gradient.items():
        torch.testing.assert_close(gradient[name], value, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(result.logits, wanted_result.logits, rtol=1e-8, atol=1e-10)
