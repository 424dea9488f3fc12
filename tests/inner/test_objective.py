"""Inputs, targets and outputs in dicts, beside a loop with autograd; all in float64."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from fomal.engine.tracing import Tracer
from fomal.inner import SGD, BradleyTerry, CrossEntropy, Loss, SquaredError
from fomal.inner.loss import Forward, check_loss
from fomal.inner.loss_of_targets import loss_for
from fomal.inner.objective import Objective
from fomal.models.usable import checked
from fomal.utils.pytree import Data, leaves, map_leaves
from fomal.utils.tree import Tree

pytestmark = pytest.mark.traced

TASKS, SUPPORT, QUERY, LENGTH, WAYS = 2, 5, 3, 4, 3


class Reader(nn.Module):
    """Token ids and numbers to logits and a value; `tokens` is the name of a frozen parameter and of an input."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.body = nn.Embedding(7, 4), nn.Linear(6, 8)
        self.logits, self.value = nn.Linear(8, WAYS), nn.Linear(8, 1)
        self.tokens = nn.Parameter(torch.tensor(1.5), requires_grad=False)

    def forward(self, x: dict[str, Any]) -> dict[str, Any]:
        words = (self.embed(x["tokens"]) * x["more"]["mask"][..., None]).mean(1)  # (B, 4)
        hidden = torch.tanh(self.body(torch.cat([words, x["more"]["numbers"]], 1)) * self.tokens)
        hidden = hidden + x["hint"][:, None] if "hint" in x else hidden
        return {"logits": self.logits(hidden - hidden.mean(0)), "heads": {"value": self.value(hidden)[:, 0]}}


class Both(Loss):
    """Cross-entropy of one output and squared error of the other."""

    def __call__(self, forward: Forward, x: Data, y: Data) -> Tensor:
        output = forward(x)
        apart = output["heads"]["value"] - y["number"]
        return F.cross_entropy(output["logits"], y["label"], reduction="none") + apart.square()

    def weights(self, y: Data) -> Tensor:
        return 1 + y["number"].square()


def examples(count: int, hint: bool = False) -> tuple[Any, Any]:
    numbers = torch.randn(TASKS, count, 4, dtype=torch.float64)
    x = {
        "tokens": torch.randint(7, (TASKS, count, LENGTH)),
        "more": {"mask": (torch.rand(TASKS, count, LENGTH) > 0.3).double(), "numbers": numbers[..., :2]},
    }
    y = {"label": torch.randint(WAYS, (TASKS, count)), "number": numbers[..., 3]}
    return {**x, **({"hint": numbers[..., 2]} if hint else {})}, y


def problem(execution: str) -> tuple[Objective, Tree]:
    torch.manual_seed(0)
    network = Reader().double()
    tracer = Tracer(network, True) if execution == "traced" else None
    trained = ((name, p) for name, p in network.named_parameters() if p.requires_grad)
    params = {name: p.detach() + 0.1 * torch.randn(TASKS, *p.shape, dtype=p.dtype) for name, p in trained}
    return Objective(network, execution != "looped", tracer, Both()), params


def task(value: Any, t: int) -> Any:
    return map_leaves(lambda leaf: leaf[t], value)


def close(found: Any, expected: Any) -> None:
    torch.testing.assert_close(leaves(found), leaves(expected), rtol=1e-10, atol=1e-12)


def written_out(objective: Objective, params: Tree, x: Data, y: Data, vectors: Tree) -> tuple[Tree, Tree, Tensor]:
    """Gradients, Hessians times vectors and losses, task by task, by autograd."""
    found: list[tuple[Any, Any, Any]] = []
    for t in range(TASKS):
        p = {name: v.clone().requires_grad_() for name, v in task(params, t).items()}
        output = functional_call(objective.network, p, (task(x, t),))
        label, number = y["label"][t], y["number"][t]
        losses = F.cross_entropy(output["logits"], label, reduction="none")
        losses = losses + (output["heads"]["value"] - number).square()
        loss = (losses * (1 + number**2)).sum() / (1 + number**2).sum()
        gradient = torch.autograd.grad(loss, list(p.values()), create_graph=True)
        along = sum((g * v).sum() for g, v in zip(gradient, task(vectors, t).values(), strict=True))
        found.append((gradient, torch.autograd.grad(along, list(p.values())), loss))
    gradients, products, losses_of = zip(*found, strict=True)
    each = [[torch.stack(parts) for parts in zip(*of, strict=True)] for of in (gradients, products)]
    gradient, product = (dict(zip(params, of, strict=True)) for of in each)
    return gradient, product, torch.stack(losses_of)


@pytest.mark.parametrize("execution", ["looped", "vectorised", "traced"])
def test_dicts_are_those_of_a_loop(execution: str, caplog: pytest.LogCaptureFixture) -> None:
    objective, params = problem(execution)
    x, y = examples(SUPPORT)
    vectors = {name: torch.randn_like(p) for name, p in params.items()}
    gradients, products, losses = written_out(objective, params, x, y, vectors)
    close(objective.gradients(params, x, y), (gradients, losses))
    close(objective.losses(params, x, y), losses)
    close(objective.hessian_products(params, x, y, vectors), products)
    moved = objective.step(SGD(0.1), params, {}, x, y, {})[0]
    close(moved, {name: p - 0.1 * gradients[name] for name, p in params.items()})
    frozen = {"value.bias": params.pop("value.bias")[0]}  # the same for all tasks
    whole = {**params, "value.bias": frozen["value.bias"].expand(TASKS, -1)}
    close(objective.gradients(params, x, y, frozen)[1], written_out(objective, whole, x, y, vectors)[2])
    assert not caplog.records


@pytest.mark.parametrize("hint", [False, True])
@pytest.mark.parametrize("execution", ["looped", "vectorised", "traced"])
def test_predictions_are_the_networks_dicts(execution: str, hint: bool) -> None:
    """A query shares a batch with the support only where both are built alike."""
    objective, params = problem(execution)
    support, query = examples(SUPPORT, hint)[0], examples(QUERY)[0]
    query = dict(reversed(query.items()))  # the order says nothing
    together, alone = objective.predict(params, query), objective.predict_inductive(params, support, query)
    for t in range(TASKS):
        close(task(together, t), functional_call(objective.network, task(params, t), (task(query, t),)))
        for q in range(QUERY):
            batch = map_leaves(lambda leaf, t=t, q=q: leaf[t, q : q + 1], query)
            if not hint:
                batch = map_leaves(lambda a, b: torch.cat([a, b]), task(support, t), batch)
            expected = functional_call(objective.network, task(params, t), (batch,))
            close(task(task(alone, t), q), map_leaves(lambda leaf: leaf[-1], expected))


def test_dicts_are_vectorised_after_a_look() -> None:
    objective, params = problem("vectorised")
    objective = Objective(objective.network, loss=objective.loss, query_loss=Both())
    start = task(params, 0)
    objective.settle(start, *examples(SUPPORT), second_order=True, query=examples(QUERY))
    assert objective.vectorize
    assert objective.is_settled(second_order=True, with_query=True)


def test_an_input_with_the_name_of_a_parameter_does_not_hide_it() -> None:
    objective, params = problem("traced")
    x, y = examples(SUPPORT)
    for _ in range(2):
        objective.network.tokens.data = 2 * objective.network.tokens.data
        plain = objective.eager()
        close(objective.losses(params, x, y), plain.losses(params, x, y))
        close(objective.predict(params, x), plain.predict(params, x))
    assert objective.tracer is not None
    assert len(objective.tracer.ways) == 2


def test_16_bit_parameters_meet_tokens_and_numbers() -> None:
    torch.manual_seed(0)
    network = Reader().bfloat16()
    params = {n: p.detach().float().expand(TASKS, *p.shape) for n, p in network.named_parameters() if p.requires_grad}
    x, y = (map_leaves(lambda t: t.bfloat16() if t.is_floating_point() else t, part) for part in examples(SUPPORT))
    gradients, losses = Objective(network, True, loss=Both()).gradients(params, x, y)
    assert losses.dtype == torch.float32
    wide = map_leaves(lambda t: t.double() if t.is_floating_point() else t, (params, x, y))
    expected = Objective(network.double(), True, loss=Both()).gradients(*wide)
    torch.testing.assert_close(losses.double(), expected[1], rtol=0.05, atol=0)
    assert {g.dtype for g in gradients.values()} == {torch.float32}


def test_preferences_between_dicts() -> None:
    torch.manual_seed(0)
    x = {"ids": torch.randint(5, (4, 2, 3)), "scale": torch.rand(4, 2)}
    embed = torch.randn(5)
    reward = lambda x: embed[x["ids"]].sum(1) * x["scale"]  # noqa: E731
    y = torch.tensor([0, 1, 1, 0])
    check_loss(BradleyTerry(), reward, x, y, 2)
    r = embed[x["ids"]].sum(2) * x["scale"]
    expected = -F.logsigmoid(r.gather(1, y[:, None]) - r.gather(1, 1 - y[:, None]))[:, 0]
    torch.testing.assert_close(BradleyTerry()(reward, x, y), expected)


LABELS = torch.tensor([0, 1, 2, 0])
TWO = {"a": torch.zeros(4, 3), "b": {"c": torch.zeros(4)}}


class Returns(nn.Module):
    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output

    def forward(self, x: Any) -> Any:
        return self.output


@pytest.mark.parametrize(
    ("loss", "output", "y", "message"),
    [
        (
            *(CrossEntropy(), TWO, LABELS),
            "model.network returns a dict rather than one tensor, {'a': (4, 3) of torch.float32, 'b': {'c': (4,) of "
            "torch.float32}}, of which CrossEntropy knows nothing: let its forward return the one alone, or give",
        ),
        (
            *(SquaredError(), torch.zeros(4, 3), {"a": torch.zeros(4, 3)}),
            "the data's targets are {'a': (3,) of torch.float32} per example, but SquaredError takes one tensor: give",
        ),
        (
            Both(),
            {"logits": torch.zeros(4, 3)},
            {"label": LABELS, "number": torch.zeros(4)},
            "model.loss Both fails on",
        ),
        (Both(), {"a": []}, LABELS, "model.network returns {'a': a list} rather than a tensor of logits"),
        (Both(), {}, LABELS, "model.network returns {} rather than a tensor of logits"),
        (Both(), {"a": LABELS}, LABELS, "model.network returns {'a': (4,) of torch.int64}: let its forward return fl"),
    ],
)
def test_what_does_not_fit_is_refused(loss: Loss, output: Any, y: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        check_loss(loss, checked(Returns(output), y), {"x": torch.zeros(4, 2)}, y, 3)
    assert "\n" not in str(error.value)


def test_targets_in_dicts_need_a_loss() -> None:
    with pytest.raises(
        ValueError, match="^model.loss is not given, and targets that are a dict, {'a': .4, 3. of torch"
    ):
        loss_for({"a": torch.zeros(4, 3)})
