"""Networks that cannot be used are refused before work starts, by one line."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fomal.inner import SGD
from fomal.learner.meta_learner import MetaLearner
from fomal.outer import Reptile
from tests.helpers.learners import Blobs, trainer


def flat(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Flatten(), *layers)


def frozen() -> nn.Module:
    return flat(nn.Linear(81, 3)).requires_grad_(False)


def compiled_in_place() -> nn.Module:
    network = flat(nn.Linear(81, 3))
    network[1].compile()
    return network


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: 3, "model.network is a int, not a torch.nn.Module"),
        (lambda: flat(), "model.network, a Sequential, has no parameters: there is nothing to learn"),
        (frozen, "all parameters of model.network, a Sequential, are frozen: .* set requires_grad"),
        (
            lambda: flat(nn.LazyLinear(3)),
            "'1.weight' of model.network has no shape yet .* call the network on an example",
        ),
        (lambda: flat(nn.Linear(81, 4), nn.LazyBatchNorm1d(affine=False)), "'2.running_mean' of model.network has no"),
        (lambda: torch.jit.script(flat(nn.Linear(81, 3))), "scripted or traced by torch.jit.* give the module that it"),
        (lambda: flat(torch.jit.script(nn.Linear(81, 3))), "'1' in model.network is a RecursiveScriptModule, scripted"),
        (
            lambda: torch.compile(flat(nn.Linear(81, 3))),
            "compiled by torch.compile already.* model.execution.compiled: true",
        ),
        (compiled_in_place, "'1' in model.network is a Linear, compiled by torch.compile already"),
        (lambda: nn.DataParallel(flat(nn.Linear(81, 3))), "is a DataParallel: give the module within, and trainer.dev"),
        (lambda: nn.BatchNorm1d(3), "the network is a BatchNorm1d itself.* use fomal.models.BatchNorm, or put it into"),
    ],
)
def test_a_network_that_cannot_be_adapted_is_refused_when_the_learner_is_made(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        MetaLearner(make(), Reptile(), SGD())
    assert "\n" not in str(error.value)


class Returns(nn.Module):
    def __init__(self, wrap: Any) -> None:
        super().__init__()
        self.head, self.wrap = nn.Linear(81, 3), wrap

    def forward(self, x: Tensor) -> Any:
        return self.wrap(self.head(x.flatten(1)))


def fails(y: Tensor) -> Tensor:
    raise AttributeError("no such thing\nand a story")


@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (
            lambda y: (y, y),
            "model.network returns a tuple rather than a tensor of logits: let its forward return these",
        ),
        (lambda y: {"logits": y}, "model.network returns a dict rather than"),
        (lambda y: None, "model.network returns a NoneType rather than"),
        (lambda y: y.argmax(1), "model.network returns torch.int64: let its forward return floating-point logits"),
        (lambda y: y[:1], re.escape("model.network returns (3,) per example, but data.ways=3")),
        (lambda y: y[:, :2], re.escape("model.network returns (2,) per example, but data.ways=3")),
        (fails, r"does not take the data's inputs, \(1, 9, 9\) per example of torch.float32 \(no such thing\)"),
    ],
)
def test_outputs_that_are_no_predictions_are_refused_before_training(wrap: Any, message: str) -> None:
    learner = MetaLearner(Returns(wrap), Reptile(), SGD())
    with pytest.raises(ValueError, match=message) as error:
        trainer(1).fit(learner, datamodule=Blobs())
    assert "\n" not in str(error.value)
