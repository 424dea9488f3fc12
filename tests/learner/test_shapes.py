"""Networks compared with a file's weights before memory is taken for them."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from torch import nn

from fomal.learner.shapes import check_shapes
from fomal.models import MLP, Classifier
from fomal.run.schema import Mismatch


def check(make: Callable[[], nn.Module], weights: dict[str, torch.Tensor]) -> None:
    check_shapes(make, weights, "the file", "the network")


def test_what_fits_passes_and_leaves_no_trace() -> None:
    def make() -> nn.Module:
        random.random()
        return nn.Sequential(MLP(), nn.BatchNorm1d(1), nn.Linear(int(torch.randperm(1).numel()), 3))

    network = make()
    network[1] = nn.BatchNorm1d(1, track_running_stats=False)  # as it is used
    states = random.getstate(), torch.get_rng_state()
    check(make, network.state_dict())
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])
    assert torch.empty(1).device.type == "cpu"


def test_a_constructor_that_looks_at_values_is_left_to_later() -> None:
    def make() -> nn.Module:
        return nn.Linear(int(torch.ones(3).sum().item()), 2)

    check(make, {"anything": torch.ones(1)})
    with pytest.raises(Mismatch, match=r"the network makes 2 tensors of 200020000 numbers or more, far more than the"):
        check(lambda: nn.Sequential(nn.Linear(10_000, 20_000), make()), {"anything": torch.ones(1)})


def test_what_a_constructor_makes_for_a_while_counts() -> None:
    small = Classifier("torchvision.models.resnet18", 2)
    check(lambda: Classifier("torchvision.models.resnet18", 2), _as_used(small))
    with pytest.raises(Mismatch, match="far more than the file has"):
        check(lambda: Classifier("torchvision.models.resnet18", 2, {"num_classes": 10**9}), _as_used(small))


def _as_used(network: nn.Module) -> dict[str, torch.Tensor]:
    return {k: t for k, t in network.state_dict().items() if "running" not in k and "num_batches" not in k}


def test_a_constructor_without_end_is_stopped() -> None:
    def make() -> nn.Module:
        return nn.Sequential(*(nn.Linear(1, 1) for _ in range(10**9)))

    with pytest.raises(Mismatch, match="the network makes 1003 tensors of 1003 numbers or more, far more than"):
        check(make, {"0.weight": torch.ones(1, 1)})


def test_a_buffer_counts_and_the_constructors_own_refusal_is_raised() -> None:
    class Table(nn.Module):
        def __init__(self, entries: int) -> None:
            super().__init__()
            if entries < 0:
                raise ValueError(f"entries={entries}")
            self.register_buffer("table", torch.zeros(entries), persistent=False)
            self.weight = nn.Parameter(torch.ones(1))

    check(lambda: Table(10), {"weight": torch.ones(1)})
    with pytest.raises(Mismatch, match="makes 2 tensors of 10000000001 numbers"):
        check(lambda: Table(10**10), {"weight": torch.ones(1)})
    with pytest.raises(ValueError, match="entries=-1"):
        check(lambda: Table(-1), {"weight": torch.ones(1)})
