"""A stand-in for CUDA graphs on the CPU: the operations of one run, repeated on the same tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

ITEM = torch.ops.aten._local_scalar_dense.default


class _Tape(TorchDispatchMode):  # type: ignore[no-untyped-call] # torch's
    """Keeps each operation with its arguments: numbers as they are, tensors by identity."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.done: list[Any] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op is ITEM:
            raise RuntimeError("a number is read from a tensor")  # a CUDA graph cannot wait for the device
        result = op(*args, **(kwargs or {}))
        self.done.append((op, args, kwargs or {}, result))
        return result


def tape(function: Any, buffers: list[Tensor]) -> Any:
    """A `fomal.engine.cuda_graph.Capture` for the CPU. As in a CUDA graph, all that is not computed from a
    tensor stays as it was in the run that was captured, and results are where they were."""
    with _Tape() as mode:
        outputs = function(buffers)

    def replay() -> list[Tensor]:
        now: dict[int, Tensor] = {}

        def present(value: Any) -> Any:
            return now.get(id(value), value) if isinstance(value, Tensor) else value

        for op, args, kwargs, before in mode.done:
            after = op(*tree_map(present, args), **tree_map(present, kwargs))
            for old, new in zip(tree_leaves(before), tree_leaves(after), strict=True):
                if isinstance(old, Tensor):
                    now[id(old)] = new
        return [present(t) for t in outputs]

    return replay


def traced(function: Any, buffers: list[Tensor]) -> Any:
    """The same by torch's own tracer, which bakes in the same things, and is slower."""
    graph = make_fx(function, tracing_mode="real")(buffers)
    return lambda: graph(buffers)
