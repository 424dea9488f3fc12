"""The stacked operations are torch's, for each task by itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad, vmap

from fomal.engine.kernels import StackedOperations, conv2d, max_pool2d, normalise, pad
from fomal.models.norm import batch_norm

TASKS, BATCH = 3, 4
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-4}  # relative to the largest value: sums of some hundred terms


def near(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    scale = expected.abs().max().clamp_min(1e-30)
    assert ((found - expected).abs().max() / scale).item() < TOLERANCE[expected.dtype]


def check(function: Any, plain: Any, tensors: list[Tensor], dims: tuple[int | None, ...]) -> None:
    """Values and gradients under vmap against torch's function task by task."""
    places = tuple(range(len(tensors)))

    def weighted(fn: Any) -> Any:
        def total(*args: Tensor) -> Tensor:
            y = fn(*args)
            return (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)).sum()

        return total

    alone = [
        [t if d is None else t.select(d, task) for t, d in zip(tensors, dims, strict=True)] for task in range(TASKS)
    ]
    near(vmap(function, in_dims=dims)(*tensors), torch.stack([plain(*args) for args in alone]))

    def bent(fn: Any) -> Any:  # the squared norm of the gradients, whose gradient has second derivatives in it
        return lambda *args: sum(g.square().sum() for g in grad(weighted(fn), places)(*args))

    for derive in (weighted, bent):
        found = vmap(grad(derive(function), places), in_dims=dims)(*tensors)
        expected = [grad(derive(plain), places)(*args) for args in alone]
        for place in places:
            near(found[place], torch.stack([gradients[place] for gradients in expected]))


SETTINGS = [
    {},
    {"stride": 2, "padding": 1},
    {"stride": (2, 1), "padding": (0, 2)},
    {"dilation": 2, "padding": 2},
    {"groups": 2, "padding": 1},
    {"groups": 4},  # depthwise
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_convolution_is_that_of_each_task(settings: dict[str, Any], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(TASKS, BATCH, 4, 9, 8, dtype=dtype)
    weight = torch.randn(
        TASKS, 6 if settings.get("groups") != 4 else 8, 4 // settings.get("groups", 1), 3, 3, dtype=dtype
    )
    bias = torch.randn(TASKS, weight.shape[1], dtype=dtype)

    def mine(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return conv2d(x, w, b, **settings)

    def theirs(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return F.conv2d(x, w, b, **settings)

    check(mine, theirs, [x, weight, bias], (0, 0, 0))
    check(mine, theirs, [x[0], weight, bias], (None, 0, 0))  # the same images
    check(mine, theirs, [x, weight[0], bias[0]], (0, None, None))  # the same weights
    check(mine, theirs, [x.movedim(0, 2), weight.movedim(0, 4), bias.movedim(0, 1)], (2, 4, 1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_batch_norm_padding_and_pooling_are_those_of_each_task(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(TASKS, BATCH, 4, 7, 6, dtype=dtype)
    scale, shift = torch.randn(2, TASKS, 4, dtype=dtype)
    check(lambda *a: normalise(*a, 1e-3), lambda *a: batch_norm(*a, 1e-3), [x, scale, shift], (0, 0, 0))
    check(lambda *a: normalise(*a, 1e-3), lambda *a: batch_norm(*a, 1e-3), [x, scale[0], shift[0]], (0, None, None))
    for sides in ((0, 1, 0, 1), (2, 0), (1, 2, 3, 0)):
        check(lambda x, sides=sides: pad(x, sides), lambda x, sides=sides: F.pad(x, sides), [x], (0,))
    for window in (
        {"kernel_size": 2},
        {"kernel_size": (3, 2), "stride": 1, "padding": 1},
        {"kernel_size": 2, "ceil_mode": True},
    ):
        check(lambda x, w=window: max_pool2d(x, **w), lambda x, w=window: F.max_pool2d(x, **w), [x], (0,))


def test_rules_nest() -> None:
    torch.manual_seed(0)
    x = torch.randn(TASKS, 5, BATCH, 2, 8, 8, dtype=torch.float64)  # queries of a task, each with a batch of its own
    weight, scale, shift = torch.randn(TASKS, 3, 2, 3, 3).double(), *torch.randn(2, TASKS, 3).double()

    def block(convolve: Any, norm: Any, pool: Any) -> Any:
        return lambda x, w, a, b: pool(norm(convolve(F.pad(x, (0, 1, 0, 1)), w), a, b, 1e-3), 2)

    mine = vmap(vmap(block(conv2d, normalise, max_pool2d), in_dims=(0, None, None, None)))(x, weight, scale, shift)
    plain = block(F.conv2d, batch_norm, F.max_pool2d)
    near(
        mine, torch.stack([torch.stack([plain(q, weight[t], scale[t], shift[t]) for q in x[t]]) for t in range(TASKS)])
    )


def test_nothing_is_copied_from_one_operation_to_the_next() -> None:
    x, weight = torch.randn(TASKS, BATCH, 4, 8, 8), torch.randn(TASKS, 4, 4, 3, 3)
    scale, shift = torch.ones(TASKS, 4), torch.zeros(TASKS, 4)
    first = vmap(conv2d)(x, weight)  # in the common layout from here on
    for name, run in {
        "convolution": lambda t: vmap(conv2d)(t, weight),
        "batch norm": lambda t: vmap(lambda *a: normalise(*a, 1e-3))(t, scale, shift),
        "padding": lambda t: vmap(lambda t: pad(t, (1, 1)))(t),
        "pooling": lambda t: vmap(lambda t: max_pool2d(t, 2))(t),
    }.items():
        y = run(first)
        assert y.permute(1, 3, 4, 0, 2).is_contiguous(), name  # (B, H, W, T, C) in memory


def test_calls_of_another_form_run_as_they_would() -> None:
    x = torch.randn(BATCH, 4, 8, 8)
    weight = torch.randn(4, 4, 3, 3)
    calls = [
        lambda: F.conv2d(x, weight, padding="same"),
        lambda: F.conv1d(x[0], weight[:, :, 0].repeat(1, 2, 1)),
        lambda: F.pad(x, (1, 1, 1, 1), mode="reflect"),
        lambda: F.pad(x, (1, 1), value=2.0),
        lambda: F.pad(x, (-1, 1)),
        lambda: F.max_pool2d(x, 2, return_indices=True)[1],
        lambda: F.max_pool2d(x[0], 2),
        lambda: batch_norm(x.flatten(2), torch.ones(4), torch.zeros(4), 1e-3),
        lambda: F.conv2d(x, weight, None, 2, 1),
        lambda: F.max_pool2d(x, 3, stride=2),
    ]
    for call in calls:
        expected = call()
        with StackedOperations():
            torch.testing.assert_close(call(), expected)
