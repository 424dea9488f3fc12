"""Comparing, random states, and when a faster way is made, kept and given up."""

from __future__ import annotations

import logging
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fomal.engine.backend import Backend, deviation, kept_random_states
from fomal.engine.tracing import Tracer
from fomal.inner.objective import Objective
from fomal.utils.tree import detach, stack
from tests.helpers.episodes import classification_episode


def draws() -> list[float]:
    return [random.random(), float(np.random.rand()), torch.rand(()).item()]  # noqa: NPY002


def test_random_states_are_put_back_and_watched() -> None:
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(0)
    with kept_random_states() as drawn:
        assert not drawn()
        first = draws()
        assert drawn()
    with kept_random_states() as drawn:
        assert not drawn()
    assert draws() == first
    for draw in (random.random, np.random.rand, lambda: torch.rand(())):
        with kept_random_states() as drawn:
            draw()
            assert drawn()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("place", range(3))
def test_a_task_that_is_not_finite_is_off_wherever_it_is(place: int, bad: float) -> None:
    expected = {"a": torch.ones(3, 2), "b": torch.ones(3)}
    found = {name: t.clone() for name, t in expected.items()}
    found["a"][place, 0] = bad
    off = deviation(found, expected, most=1.0, whole=2.0)
    assert off is not None
    assert off[:2] == (0, torch.inf)


def test_parts_are_measured_by_task_or_as_a_whole() -> None:
    expected = ({"a": torch.ones(4, 9)}, torch.ones(4), torch.tensor(2.0).double())
    one = expected[0]["a"].clone()
    one[2] *= 1.05  # one task of four
    assert deviation(({"a": one}, *expected[1:]), expected, whole=0.1, most=1e-6) is None
    assert deviation(({"a": one}, *expected[1:]), expected, whole=0.01, most=1e-6) == (0, pytest.approx(0.05), 0)
    most = expected[0]["a"] * torch.tensor([[1.01], [1.01], [1.01], [1.0]])
    assert deviation(({"a": most}, *expected[1:]), expected, whole=0.1, most=1e-3) == (0, pytest.approx(0.01), 0)
    rough = ({"a": expected[0]["a"] * 1.002}, *expected[1:])  # rounding alone takes it as far
    assert deviation(({"a": most}, *expected[1:]), expected, rough, whole=0.1, most=1e-3) is None
    assert deviation((*expected[:2], expected[2] * (1 + 1e-8)), expected) == (2, pytest.approx(1e-8), 0)
    assert deviation((*expected[:2], expected[2] * (1 + 1e-10)), expected) is None
    assert deviation((torch.ones(0, 3), {}), (torch.ones(0, 3), {}), whole=0.1, most=1e-3) is None  # of no steps


class Double(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return 2 * x


def test_a_way_is_made_once_for_a_key_and_forgotten_where_the_network_changes(caplog: Any) -> None:
    network, made = nn.Linear(1, 1), []
    backend = Backend(network, "plain: %s", "draws", "trace")
    x = torch.ones(2)

    def way(name: str) -> Any:
        backend.look()
        return backend.way(backend.key(name, [], [x]), lambda: x, lambda expected: made.append(name) or len(made))

    assert [way("a"), way("a"), way("b"), way("a")] == [1, 1, 2, 1]
    network.bias.requires_grad_(False)
    network.weight = nn.Parameter(torch.ones(1, 1))
    assert way("a") == 3
    with torch.no_grad():
        assert way("a") == 4
    assert backend.way("nothing to compare", lambda: x * torch.nan, lambda expected: 1) is None
    assert not backend.reason
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        assert backend.way("draws", lambda: torch.rand(2), lambda expected: 1) is None
        assert backend.way("b", lambda: x, lambda expected: 1) is None  # for good, and with one line
    assert [record.getMessage() for record in caplog.records] == ["plain: draws"]


def test_an_error_of_the_function_is_its_own(caplog: pytest.LogCaptureFixture) -> None:
    tracer = Tracer(nn.Linear(2, 2), True)

    def fails(params: Any) -> Tensor:
        raise KeyError("of the user's")

    with pytest.raises(KeyError, match="of the user's"):
        Tracer._first(tracer, "key", fails, ({}, {"a": torch.ones(2)}))
    assert tracer.is_on
    assert not caplog.records


def test_what_a_forward_changes_itself_is_no_change_of_how_to_run_it() -> None:
    torch.manual_seed(0)
    counts = Double()
    network = nn.Sequential(nn.Flatten(), counts, nn.Dropout(0.5), nn.Linear(81, 3)).double()
    objective, episode = Objective(network), classification_episode()
    phi = detach(dict(network.named_parameters()))
    state = torch.get_rng_state()
    objective.settle(phi, episode.support_x[:2], episode.support_y[:2])
    assert torch.equal(torch.get_rng_state(), state)
    assert objective.vectorize
    objective.losses(stack(phi, episode.tasks), episode.support_x, episode.support_y)
    assert counts.calls > 2
    assert objective.is_settled(second_order=False)
    counts.scale = 3.0
    assert not objective.is_settled(second_order=False)
    assert not objective.is_settled(second_order=False)  # until it is settled
