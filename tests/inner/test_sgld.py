from __future__ import annotations

import pytest
import torch

from fomal.inner import SGD, SGLD
from fomal.utils import tree

LR, TEMPERATURE = 0.1, 0.5


@pytest.fixture
def phi(network):
    return tree.detach(dict(network.named_parameters()))


def noise(
    tasks: torch.Tensor, step: int = 0, size: int = 7, seed: int = 0, dtype: torch.dtype = torch.float64
) -> torch.Tensor:
    """The displacement without a gradient, in units of its standard deviation: (T, size)."""
    optimizer = SGLD(LR, TEMPERATURE).for_tasks(seed, 0, tasks)
    zero = {"a": torch.zeros(len(tasks), size, dtype=dtype)}
    state = {"shared": {"steps": torch.tensor(step)}}
    return optimizer.update(zero, state, zero)[0]["a"] / (2 * LR * TEMPERATURE) ** 0.5


def test_without_temperature_it_is_sgd(make_inner, phi):
    ours = make_inner(SGLD(0.1, temperature=0.0, weight_decay=0.01)).rollout(phi).end
    plain = make_inner(SGD(0.1, weight_decay=0.01)).rollout(phi).end
    for name in phi:
        assert torch.equal(ours[name], plain[name])


def test_the_noise_is_standard_normal_and_independent():
    n = 20_000
    values = noise(torch.arange(n), size=5)  # an odd number, for the pairs of the transform
    assert values.mean(0).abs().max() < 4 / n**0.5
    assert (values.var(0) - 1).abs().max() < 4 * (2 / n) ** 0.5
    assert values.pow(4).mean() == pytest.approx(3, abs=4 * (96 / (5 * n)) ** 0.5)
    others = torch.cat([values, noise(torch.arange(n), step=1, size=5), noise(torch.arange(n), seed=1, size=5)], 1)
    correlations = torch.corrcoef(others.T) - torch.eye(15, dtype=torch.float64)
    assert correlations.abs().max() < 5 / n**0.5  # 105 pairs


def test_the_noise_is_the_episodes_own():
    tasks = torch.tensor([3, 8, 1, 2**40])
    all_four = noise(tasks)
    assert torch.equal(noise(tasks[[2, 0]]), all_four[[2, 0]])
    assert torch.equal(noise(tasks[3:]), all_four[3:])
    single = noise(tasks, dtype=torch.float32)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), all_four, rtol=1e-6, atol=0)


def test_a_displacement_has_the_mean_and_variance_of_langevins_equation(make_inner, episode, phi):
    n = 3000
    many = episode.select(torch.zeros(n, dtype=torch.int64))._replace(number=torch.arange(n))
    inner = make_inner(SGLD(LR, 1e-3), steps=1)
    inner = make_inner(SGLD(LR, 1e-3), episode=many, indices=(inner.indices[0][:1].expand(n, -1),))
    (step,) = inner.steps(phi)
    gradient = inner.objective.gradients(tree.stack(phi, 1), *(part[:1] for part in next(inner.batches())))[0]
    deviation = (2 * LR * 1e-3) ** 0.5
    for name in phi:
        moved = step.after[name] - step.before[name]
        assert (moved.mean(0) + LR * gradient[name][0]).abs().max() < 5 * deviation / n**0.5
        assert (moved.var(0) / deviation**2 - 1).abs().max() < 5 * (2 / n) ** 0.5


def test_on_a_quadratic_it_settles_at_its_temperature():
    """p <- (1 - lr h) p + sqrt(2 lr T) xi has variance 2 lr T / (1 - (1 - lr h)^2), T / h for a small lr."""
    h, n = 2.0, 4000
    optimizer = SGLD(LR, TEMPERATURE).for_tasks(0, 0, torch.arange(n))
    p = {"a": torch.zeros(n, 1, dtype=torch.float64)}
    state = optimizer.init(p)
    for _ in range(60):
        p, state = optimizer.update({"a": h * p["a"]}, state, p)
    exact = 2 * LR * TEMPERATURE / (1 - (1 - LR * h) ** 2)
    assert p["a"].var().item() == pytest.approx(exact, rel=5 * (2 / n) ** 0.5)
    assert exact == pytest.approx(TEMPERATURE / h, rel=0.12)


def test_going_on_equals_not_stopping(make_inner, phi):
    whole = make_inner(SGLD(LR, 1e-3))
    first = make_inner(SGLD(LR, 1e-3), indices=whole.indices[:2]).rollout(phi)
    second = make_inner(SGLD(LR, 1e-3), indices=whole.indices[2:]).rollout(phi, onward=first)
    expected = whole.rollout(phi)
    for name in phi:
        assert torch.equal(second.end[name], expected.end[name])
    assert torch.equal(second.losses, expected.losses)
    assert whole.mean_state(second.state)["shared"]["steps"] == 4
    carried = make_inner(SGLD(LR, 1e-3), state=whole.mean_state(second.state)).rollout(phi).end  # other noise
    assert any(not torch.equal(carried[name], expected.end[name]) for name in phi)


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="temperature=-1"):
        SGLD(temperature=-1)
    p = {"a": torch.zeros(2, 1)}
    with pytest.raises(RuntimeError, match="call for_tasks"):
        SGLD().update(p, SGLD().init(p), p)
