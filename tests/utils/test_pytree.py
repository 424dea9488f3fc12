"""Nested dicts and tuples of tensors, beside torch's own pytrees."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

from fomal.utils import pytree


class Pair(NamedTuple):
    first: Tensor
    size: int


VALUE = {"b": (torch.ones(2), {"x": torch.zeros(3), "a": torch.arange(2)}), "a": Pair(torch.ones(()), 5), "none": {}}


def test_it_is_torchs() -> None:
    leaves, _ = pytree.flatten(VALUE)
    expected = [leaf for leaf in tree_flatten(VALUE)[0] if isinstance(leaf, Tensor)]
    assert [id(t) for t in leaves] == [id(t) for t in expected]
    found = pytree.unflatten(pytree.skeleton(VALUE), (t + 1 for t in leaves))
    wanted = tree_map(lambda leaf: leaf + 1 if isinstance(leaf, Tensor) else leaf, VALUE)
    torch.testing.assert_close(tree_flatten(found)[0], tree_flatten(wanted)[0], rtol=0, atol=0)
    assert tree_flatten(found)[1] == tree_flatten(wanted)[1]
    assert found["a"].size == 5


def test_all_that_is_no_tensor_tells_values_apart() -> None:
    a, b = torch.zeros(2), torch.zeros(2)
    values = [(a, b), (a, (b,)), {"x": a, "y": b}, {"y": a, "x": b}, {"x": {"y": a}, "z": b}, {"x": {"y": a, "z": b}}]
    values += [Pair(a, 1), Pair(a, 2), (a, 1), (a,), ((a,), 1), {"x": a}, (a, b, {})]
    forms = [pytree.flatten(value)[1] for value in values]
    assert all(forms[i] != forms[j] for i in range(len(forms)) for j in range(i))
    assert pytree.flatten((b, a))[1] == forms[0]


def test_signatures_hold_shape_type_and_autocast() -> None:
    given = [torch.zeros(2), torch.zeros(3), torch.zeros(2).double(), torch.zeros(2, device="meta")]
    found = {pytree.signature([t]) for t in given}
    with torch.autocast("cpu", torch.bfloat16):
        found.add(pytree.signature(given[:1]))
    assert len(found) == 5


def test_parts_are_the_dicts_and_the_loose_tensors() -> None:
    found = pytree.parts(VALUE)
    assert [list(part) for part in found] == [[""], ["x", "a"], [""]]
    assert all(t.is_floating_point() for part in found for t in part.values())


def test_leaves_are_mapped_beside_each_other() -> None:
    other = pytree.map_leaves(lambda t: 3 * t, VALUE)
    other = dict(reversed(other.items()))  # dicts in any order
    found = pytree.map_leaves(torch.sub, other, VALUE)
    torch.testing.assert_close(found["b"], tree_map(lambda t: 2 * t, VALUE["b"]), rtol=0, atol=0)
    assert isinstance(found["a"], Pair)
    assert found["a"].size == 5
    value = {"x": [torch.zeros(2, 3).long(), torch.ones(2)], "y": "z"}
    assert [len(t) for t in pytree.leaves(pytree.stack([value, value, value]))] == [3, 3]
    assert pytree.described(value["x"][0], 1) == "(3,) of torch.int64"
    assert (
        pytree.described({"x": {"y": torch.ones(())}, "z": None})
        == "{'x': {'y': () of torch.float32}, 'z': a NoneType}"
    )
    assert pytree.is_data({"x": {"y": torch.ones(())}})
    assert not any(map(pytree.is_data, ({}, {"x": {}}, {"x": None}, (torch.ones(2),), None)))
