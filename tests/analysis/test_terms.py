from __future__ import annotations

import pytest
import torch

from fomal.analysis.problem import Problem
from fomal.analysis.terms import _jackknife, estimate_terms
from fomal.data.sinusoid import SinusoidDataModule
from fomal.inner.loop import gather_examples
from fomal.inner.objective import Objective
from fomal.models import MLP
from fomal.outer import FOMAML, MAML, BinomialMAML, QueryFOMAML, Reptile, StepCombination, TruncatedMAML
from fomal.utils import tree

BATCHES = 4
RULES = {
    "Reptile": Reptile(),
    "FOMAML": FOMAML(),
    "QueryFOMAML": QueryFOMAML(),
    "MAML": MAML(),
    "truncated": TruncatedMAML(1),
    "binomial": BinomialMAML(1),
    "combination": StepCombination([0.5, 0, 0, 2]),
}


def problems(groups=20, size=5, network=None):
    torch.manual_seed(0)
    network = (network or MLP(hidden=(8,))).double()
    phi = tree.detach(dict(network.named_parameters()))
    data = SinusoidDataModule(train_shots=30)
    numbers = [torch.arange(size * g, size * (g + 1)) for g in range(groups)]
    return [Problem.sample(Objective(network, True), phi, data.episodes("train", n), BATCHES, 6) for n in numbers]


def test_every_rule_has_the_papers_coefficients_within_the_interval():
    lr = 1e-7  # second order in lr is far below the intervals
    terms = estimate_terms(problems(), RULES, lr)
    assert (terms.tasks, terms.batches) == (100, BATCHES)
    for name, found in terms.rules.items():
        for estimate, theory in (
            (found.avg_grad, found.avg_grad_theory),
            (found.avg_grad_inner, found.avg_grad_inner_theory),
        ):
            assert abs(estimate.value - theory) < 2 * estimate.ci95 + 1e-3, (name, estimate, theory)
            assert estimate.ci95 < 0.1 * theory
        assert found.unexplained.value < 1e-3


def test_both_terms_equal_a_loop_over_tasks_and_pairs_of_mini_batches():
    drawn = problems(groups=4, size=2, network=MLP(hidden=(3,)))
    objective, start = drawn[0].objective, drawn[0].start
    sums = {"g": [], "Hg": []}
    for problem in drawn:
        for t in range(2):
            data = [
                [gather_examples(part, i)[t] for part in (problem.episode.support_x, problem.episode.support_y)]
                for i in problem.indices
            ]
            params = {n: p.clone().requires_grad_() for n, p in start.items()}
            losses = [
                (torch.func.functional_call(objective.network, params, (x,)) - y).square().mean() for x, y in data
            ]
            g = [torch.autograd.grad(loss, list(params.values()), create_graph=True) for loss in losses]
            sums["g"] += [torch.cat([v.detach().flatten() for v in gj]) for gj in g]
            for i in range(BATCHES):
                for j in range(i):  # half the gradient of g_i . g_j is the mean of H_i g_j and H_j g_i
                    product = sum((a * b).sum() for a, b in zip(g[i], g[j], strict=True))
                    both = torch.autograd.grad(product, list(params.values()), retain_graph=True)
                    sums["Hg"].append(0.5 * torch.cat([v.flatten() for v in both]))
    expected = {name: torch.stack(values) for name, values in sums.items()}
    terms = estimate_terms(drawn, {"Reptile": Reptile()}, 1e-6)
    for name, found in (("g", terms.avg_grad), ("Hg", terms.avg_grad_inner)):
        groups = expected[name].view(4, -1, expected[name].shape[1]).mean(1)
        gram = groups @ groups.T
        unbiased = (gram.sum() - gram.trace()) / 12
        assert found.value == pytest.approx(float(unbiased.clamp_min(0).sqrt()), rel=1e-9)


def test_the_interval_of_a_mean_is_the_usual_one():
    values = torch.rand(12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gram = torch.outer(torch.cat([torch.ones(12), values]), torch.cat([torch.ones(12), values])).view(2, 12, 2, 12)
    found = _jackknife(lambda g: g.mean((1, 3))[0, 1], gram)
    assert found.value == pytest.approx(values.mean())
    assert found.ci95 == pytest.approx(1.96 * values.std() / 12**0.5)


def test_too_few_groups_are_refused():
    with pytest.raises(ValueError, match="tasks: 2 groups of them are too few"):
        estimate_terms(problems(groups=2, size=1), {}, 1e-3)
