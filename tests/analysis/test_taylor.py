"""Section 5.1 of Nichol et al. 2018: what every rule's outer gradient is to first order in the inner step size."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fomal.analysis.problem import Problem
from fomal.analysis.taylor import geometric, leading_terms, residuals, slope
from fomal.data.sinusoid import SinusoidDataModule
from fomal.inner.objective import Objective
from fomal.models import MLP
from fomal.outer import FOMAML, MAML, BinomialMAML, OuterRule, QueryFOMAML, Reptile, StepCombination, TruncatedMAML
from fomal.tasks.episode import Episode
from fomal.utils import tree

BATCHES = 4
RULES = {
    "Reptile": Reptile(),
    "FOMAML": FOMAML(),
    "combination": StepCombination([0.5, 0, 2, -1]),
    "QueryFOMAML": QueryFOMAML(),
    "MAML": MAML(),
    **{f"truncated {order}": TruncatedMAML(order) for order in range(4)},
    **{f"binomial {order}": BinomialMAML(order) for order in range(4)},
}


def smooth_problem(tasks: int = 3, hidden: int = 8) -> Problem:
    torch.manual_seed(0)
    network = MLP(hidden=(hidden,)).double()
    phi = tree.detach(dict(network.named_parameters()))
    episode = SinusoidDataModule(train_shots=30).episodes("train", torch.arange(tasks))
    return Problem.sample(Objective(network, True), phi, episode, BATCHES, 6)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_the_residual_falls_with_the_square_of_the_inner_step_size(rule: OuterRule) -> None:
    alphas = geometric(1e-6, 1e-3, 10)  # three decades
    assert slope(alphas, residuals(smooth_problem(), rule, alphas)) == pytest.approx(2, abs=0.01)


@pytest.mark.parametrize("rule", [Reptile(), MAML(), BinomialMAML(1)], ids=["Reptile", "MAML", "binomial"])
@pytest.mark.parametrize("vectorize", [True, False])
def test_convolutions_with_batch_norm_obey_it_too(
    rule: OuterRule, vectorize: bool, network: nn.Module, episode: Episode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.nn.functional, "relu", torch.tanh)  # the expansion is of smooth losses
    phi = tree.detach(dict(network.named_parameters()))
    problem = Problem.sample(Objective(network, vectorize), phi, episode, BATCHES, 6)
    alphas = geometric(1e-5, 1e-3, 5)
    assert slope(alphas, residuals(problem, rule, alphas)) == pytest.approx(2, abs=0.02)
    products = problem.hessian_products(problem.gradients())
    assert not any(product.requires_grad for product in products.values())


@pytest.mark.parametrize("change", ["without the second term", "with a wrong second term", "with a wrong first term"])
def test_a_wrong_expansion_would_be_noticed(change: str) -> None:
    class Wrong(Reptile):
        def expansion(self, inner_steps):
            right = super().expansion(inner_steps)
            if "without" in change:
                return right._replace(products=[[0.0] * inner_steps] * inner_steps)
            if "second" in change:
                return right._replace(products=[list(row) for row in zip(*right.products, strict=True)])
            return right._replace(gradients=[2.0] + right.gradients[1:])

    alphas = geometric(1e-6, 1e-4, 5)
    found = slope(alphas, residuals(smooth_problem(), Wrong(), alphas))
    assert found == pytest.approx(0 if "first" in change else 1, abs=0.05)


def test_the_leading_terms_equal_a_loop_with_explicit_hessians() -> None:
    problem = smooth_problem(tasks=2, hidden=3)
    zeroth, first = leading_terms(problem, MAML().expansion(BATCHES - 1))
    names = list(problem.start)
    values = torch.cat([p.reshape(-1) for p in problem.start.values()])

    def loss(vector, x, y):
        parts = torch.split(vector, [p.numel() for p in problem.start.values()])
        params = {n: v.view(p.shape) for (n, p), v in zip(problem.start.items(), parts, strict=True)}
        return (torch.func.functional_call(problem.objective.network, params, (x,)) - y).square().mean()

    expected0, expected1 = torch.zeros_like(values), torch.zeros_like(values)
    for t in range(2):
        data = [(problem.episode.support_x[t][i[t]], problem.episode.support_y[t][i[t]]) for i in problem.indices]
        gradients = [torch.func.grad(loss)(values, *d) for d in data]
        hessians = [torch.autograd.functional.hessian(lambda v, d=d: loss(v, *d), values) for d in data]
        expected0 += gradients[-1] / 2
        for i in range(BATCHES - 1):  # MAML: H_q g_i + H_i g_q
            expected1 += (hessians[-1] @ gradients[i] + hessians[i] @ gradients[-1]) / 2
    torch.testing.assert_close(torch.cat([zeroth[n].reshape(-1) for n in names]), expected0, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(torch.cat([first[n].reshape(-1) for n in names]), expected1, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("rule", "k", "avg_grad", "avg_grad_inner"),
    [
        (MAML(), 5, 1, 2 * 4),
        (QueryFOMAML(), 5, 1, 4),
        (FOMAML(), 5, 1, 4),
        (Reptile(), 5, 5, 5 * 4 / 2),
        (StepCombination([0, 0.5, 0.5]), 3, 1, 1.5),
        (TruncatedMAML(2), 5, 1, 4 + 2),
        (BinomialMAML(1), 5, 1, 2 * 4),
    ],
)
def test_the_coefficients_are_the_papers(rule: OuterRule, k: int, avg_grad: float, avg_grad_inner: float) -> None:
    """k counts mini-batches, the query's included: MAML 1, 2 (k - 1); FOMAML 1, k - 1; Reptile k, k (k - 1) / 2."""
    expansion = rule.expansion(k - rule.needs_query)
    assert (expansion.avg_grad, expansion.avg_grad_inner) == (avg_grad, avg_grad_inner)


def test_settings_that_cannot_work_are_refused() -> None:
    problem = smooth_problem()
    episode = problem.episode
    with pytest.raises(ValueError, match="batches=1 must be at least 2"):
        Problem.sample(problem.objective, problem.start, episode, 1, 6)
    with pytest.raises(ValueError, match="batch_size=31 must be from 1 to 30, the examples of a task"):
        Problem.sample(problem.objective, problem.start, episode, 2, 31)

    class Unknown(Reptile):
        def expansion(self, inner_steps):
            return None

    with pytest.raises(ValueError, match="Unknown has no expansion"):
        residuals(problem, Unknown(), [1e-3])
