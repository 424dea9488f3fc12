"""What must hold for every outer rule, whatever the tasks, sizes and inner optimiser: symmetries and linearity."""

from functools import partial
from typing import NamedTuple

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from fomal.inner import SGD, Adam
from fomal.inner.loop import InnerLoop
from fomal.inner.objective import Objective
from fomal.models.norm import BatchNorm
from fomal.outer import FOMAML, MAML, BinomialMAML, QueryFOMAML, Reptile, StepCombination, TruncatedMAML
from fomal.tasks.episode import Episode
from fomal.tasks.sampler import minibatch_indices
from fomal.utils import tree

# Rules as functions of the number of inner steps.
RULES = [
    pytest.param(lambda steps: Reptile(), id="Reptile"),
    pytest.param(lambda steps: FOMAML(), id="FOMAML"),
    pytest.param(lambda steps: QueryFOMAML(), id="QueryFOMAML"),
    pytest.param(lambda steps: MAML(), id="MAML"),
    pytest.param(lambda steps: TruncatedMAML(min(2, steps)), id="TruncatedMAML"),
    pytest.param(lambda steps: BinomialMAML(min(2, steps)), id="BinomialMAML"),
    pytest.param(lambda steps: StepCombination([1.0, -0.5, 0.0, 2.0][:steps]), id="StepCombination"),
]
OPTIMIZERS = [SGD(0.1), SGD(0.1, momentum=0.5), Adam(0.01), Adam(0.01, eps_root=1e-8)]

every_rule = pytest.mark.parametrize("make_rule", RULES)
few = settings(max_examples=25, deadline=None, derandomize=True)
assert_close = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-12)


class Classifier(nn.Module):
    """Smooth, with batch norm, and with a row of weights for each class."""

    def __init__(self, ways):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 6, bias=False), BatchNorm(6), nn.Tanh())
        self.head = nn.Linear(6, ways)

    def forward(self, x):
        return self.head(self.body(x))


class Problem(NamedTuple):
    """A meta-batch and how to adapt to it."""

    objective: Objective
    episode: Episode
    indices: tuple
    phi: dict

    def select(self, tasks):
        return self._replace(episode=self.episode.select(tasks), indices=tuple(index[tasks] for index in self.indices))

    def gradient(self, rule, optimizer):
        state = optimizer.init(self.phi)
        return rule(InnerLoop(self.objective, optimizer, state, self.indices, self.episode), self.phi)[0]


@st.composite
def problems(draw):
    tasks, ways, steps = draw(st.integers(2, 5)), draw(st.integers(2, 4)), draw(st.integers(1, 4))
    shots, batch, seed = draw(st.integers(2, 3)), draw(st.integers(2, 7)), draw(st.integers(0, 2**32 - 1))
    torch.manual_seed(seed)
    labels = torch.arange(ways)
    x = torch.randn(tasks, ways * (shots + 1), 4, dtype=torch.float64)
    support_y, query_y = labels.repeat_interleave(shots).expand(tasks, -1), labels.expand(tasks, -1)
    episode = Episode(x[:, ways:], support_y, x[:, :ways], query_y, torch.arange(tasks), ways)
    network = Classifier(ways).double()
    indices = minibatch_indices(seed, 0, episode.number, ways * shots, steps, batch)
    return Problem(Objective(network, vectorize=True), episode, indices, tree.detach(dict(network.named_parameters())))


def permutation(data, n):
    return torch.tensor(data.draw(st.permutations(range(n))))


def setting(data, make_rule):
    """A problem, and the rule with an optimiser that it accepts."""
    problem = data.draw(problems())
    rule = make_rule(len(problem.indices))
    return problem, rule, data.draw(st.sampled_from([o for o in OPTIMIZERS if accepts(rule, len(problem.indices), o)]))


def accepts(rule, steps, optimizer):
    try:
        rule.check(steps, optimizer)
    except ValueError:
        return False
    return True


@every_rule
@given(data=st.data())
@few
def test_the_order_of_the_tasks_does_not_matter(make_rule, data):
    problem, rule, optimizer = setting(data, make_rule)
    order = permutation(data, problem.episode.tasks)
    assert_close(problem.select(order).gradient(rule, optimizer), problem.gradient(rule, optimizer))


@every_rule
@given(data=st.data())
@few
def test_a_split_meta_batch_averages_to_the_whole(make_rule, data):
    problem, rule, optimizer = setting(data, make_rule)
    tasks = problem.episode.tasks
    first = data.draw(st.integers(1, tasks - 1))
    a, b = (
        problem.select(part).gradient(rule, optimizer) for part in torch.arange(tasks).split([first, tasks - first])
    )
    mean = tree.add(tree.scaled(a, first / tasks), tree.scaled(b, 1 - first / tasks))
    assert_close(mean, problem.gradient(rule, optimizer))


@every_rule
@given(data=st.data())
@few
def test_the_order_in_a_mini_batch_does_not_matter(make_rule, data):
    problem, rule, optimizer = setting(data, make_rule)
    indices = tuple(index[:, permutation(data, index.shape[1])] for index in problem.indices)
    assert_close(problem._replace(indices=indices).gradient(rule, optimizer), problem.gradient(rule, optimizer))


@every_rule
@given(data=st.data())
@few
def test_renaming_the_classes_renames_the_rows_of_the_head(make_rule, data):
    problem, rule, optimizer = setting(data, make_rule)
    names = permutation(data, problem.episode.ways)  # class c is called names[c]

    def renamed(params):
        return {name: p[names.argsort()] if name.startswith("head.") else p for name, p in params.items()}

    episode = problem.episode
    episode = episode._replace(support_y=names[episode.support_y], query_y=names[episode.query_y])
    other = problem._replace(episode=episode, phi=renamed(problem.phi))
    assert_close(other.gradient(rule, optimizer), renamed(problem.gradient(rule, optimizer)))


@given(data=st.data())
@few
def test_step_combination_is_linear_in_its_weights(data):
    problem = data.draw(problems())
    optimizer = data.draw(st.sampled_from(OPTIMIZERS))
    numbers = st.floats(-10, 10)
    weights = st.lists(numbers, min_size=len(problem.indices), max_size=len(problem.indices)).filter(any)
    v, w, scale = data.draw(weights), data.draw(weights), data.draw(numbers)
    both = [scale * a + b for a, b in zip(v, w, strict=True)]
    assume(any(both))
    of_v, of_w, of_both = (problem.gradient(StepCombination(u), optimizer) for u in (v, w, both))
    assert_close(of_both, tree.add_scaled(of_w, of_v, scale))
