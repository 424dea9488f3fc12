"""A function over all tasks as a flat list of torch operations, recorded once for each shape and then replayed."""

from __future__ import annotations

import logging
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.fx import GraphModule
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from fomal.checks import first_line
from fomal.inner.stacked import StackedOperations
from fomal.tree import Tree, difference

log = logging.getLogger(__name__)

Function = Callable[..., Any]
Recording = Callable[[list[Tensor]], Any]
aten = torch.ops.aten

WIDE_TOLERANCE = 1e-9
"""How far a recording may be off in float64, relative to the norm: it sums in another order."""
NARROW_TOLERANCE = 1e-3
"""Likewise in the working precision, for most of the tasks."""
BENT_TOLERANCE = 0.1
"""Likewise for every task: where rounding takes one of its ReLUs over the bend, all gradients below it change."""

SHORT_TOLERANCE = 0.2
"""Likewise for most of the tasks in 16 bits, where a recording has them and torch under `vmap` has not."""


class Recorder:
    """Records functions of a network over all tasks, and replays them.

    `torch.func.vmap` and `grad` are gone from a recording: what is left are their operations on stacked tensors, with
    those of `fomal.inner.stacked` among them. A recording is compared with the function itself before it is used, in
    float64 and in the working precision, for each shape; where it cannot be made or differs, functions run as they are
    written from then on, and one line says why. Results differ by rounding.

    Whatever the network's forward does beside torch operations happens once only, so it must be the same each time.
    A network that draws random numbers, or that has hooks, is not recorded.

    Args:
        network: the network.
        wanted: False runs everything as it is written; None records a network made of known modules alone.
        compiled: hand recordings to `torch.compile`.
    """

    def __init__(self, network: nn.Module, wanted: bool | None = None, compiled: bool = False) -> None:
        self.network = network
        self.compiled = compiled
        self.reason = ""  # why functions run as they are written
        self.wanted = wanted
        self.is_on = wanted is not False
        self._recordings: dict[Any, Recording] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Without recordings, which a copy or another process makes for itself."""
        return vars(self) | {"_recordings": {}}

    def __call__(self, name: Any, function: Function, *args: Any) -> Any:
        """`function(*args)`, a function of tensors with tasks in front.

        Args:
            name: tells functions apart, with all that they depend on beside their arguments.
            function: any.
            args: tensors, and dicts of them.
        """
        leaves: list[Tensor] = []
        names: list[str] = []
        _collect(args, leaves, names)
        if not self.is_on or any(_is_transformed(leaf) for leaf in leaves):
            return function(*args)
        leaves = [leaf.contiguous() for leaf in leaves]
        key = (name, *names, *_signature(leaves), self.network.training, _autocast(leaves))
        recording = self._recordings.get(key)
        if recording is None:
            try:
                recording = self._recordings[key] = self._recorded(function, _like(args, iter(leaves)))
            except torch.OutOfMemoryError:  # there may be room for fewer tasks
                raise
            except Exception as error:  # of the network, of recording, or of the compiler: many kinds
                self._give_up(first_line(error))
                return function(*args)
        return recording(leaves)

    def _recorded(self, function: Function, args: Any) -> Recording:
        if self.wanted is None and (unknown := _unknown(self.network)):
            raise ValueError(
                f"{unknown} is not a module whose forward is known to be the same each time; model.recorded: true says "
                f"that it is"
            )
        hooked = [name for name, m in self.network.named_modules() if m._forward_hooks or m._forward_pre_hooks]
        if hooked:
            raise ValueError(f"{hooked[0] or 'the network'} has hooks, which would run once only")
        with torch.random.fork_rng(_cuda_devices(args)), _restored_random_states():
            before = _random_states()
            expected = function(*args)
            if _random_states() != before:
                raise ValueError("the network draws random numbers")
        if (wide := _wide(function, args)) is not None:
            found = record(function, wide[0])(tree_flatten(wide[0])[0])
            _compare(found, wide[1], WIDE_TOLERANCE, WIDE_TOLERANCE)
        recording = record(function, args, self.compiled)
        leaves = tree_flatten(args)[0]
        most, each = (SHORT_TOLERANCE, 1.0) if _is_short(leaves) else (NARROW_TOLERANCE, BENT_TOLERANCE)
        _compare(recording(leaves), expected, most, each)
        return recording

    def _give_up(self, reason: str) -> None:
        self.is_on = False
        self.reason = reason
        log.warning(
            "%s runs as it is written, %s: %s",
            type(self.network).__name__,
            "not compiled" if self.compiled else "which is slower (same results)",
            reason,
        )


def record(function: Function, args: Any, compiled: bool = False) -> Recording:
    """`function` as a list of operations on tensors with the shapes of `args`, which must be contiguous.

    Returns:
        A function of the tensors in `args`, one after the other.
    """
    from torch._guards import TracingContext, tracing
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    leaves, structure = tree_flatten(args)
    results: list[Any] = []  # for its form

    def flat(*leaves: Tensor) -> list[Any]:
        results.append(tree_map(lambda _: None, found := function(*tree_unflatten(leaves, structure))))
        return tree_flatten(found)[0]

    # One mode for all fake tensors, of which the recorder would otherwise make one for each operation.
    context = TracingContext(FakeTensorMode(allow_fallback_kernels=True))
    with StackedOperations(), tracing(context):
        graph = make_fx(flat)(*leaves)
    module = GraphModule(graph, graph.graph)
    join_equals(module)
    run: Function = torch.compile(keep_batch_norm(module), dynamic=False) if compiled else module

    return lambda leaves: _like(results[-1], iter(run(*leaves)))


VIEWS = {
    aten.alias.default,
    aten.expand.default,
    aten.permute.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.t.default,
    aten.transpose.int,
    aten.unsqueeze.default,
    aten.view.default,
    aten._unsafe_view.default,
}


def join_equals(module: GraphModule) -> None:
    """Take one for all operations on the same tensors, and for all views of a tensor with the same shape and strides.

    Forward and backward merge the same tensors, and `vmap` leaves many views that change nothing, each of which costs
    as much as the launch of an operation. Random operations are not recorded; one that changes a tensor ends this.
    """
    calls = [node.target for node in module.graph.nodes if isinstance(node.target, OpOverload)]
    if any(target._schema.is_mutable for target in calls):
        return
    base: dict[Any, Any] = {}
    seen: dict[Any, Any] = {}
    for node in module.graph.nodes:
        meta, is_view = node.meta.get("tensor_meta"), node.target in VIEWS
        base[node] = base[node.args[0]] if is_view else node
        call = (node.target, str(node.args), str(node.kwargs)) if node.op == "call_function" else node
        place = (base[node], meta.shape, meta.stride, meta.dtype) if hasattr(meta, "stride") else node
        same = seen.get(call) or (seen.get(place) if is_view else None)
        if same is None:
            seen[call] = node
            seen.setdefault(place, node)
        else:
            node.replace_all_uses_with(same)
            module.graph.erase_node(node)
    module.graph.eliminate_dead_code()
    module.recompile()


def _unknown(network: nn.Module) -> str:
    known = ("torch", "fomal", "torchvision", "timm")
    return next((type(m).__name__ for m in network.modules() if type(m).__module__.split(".")[0] not in known), "")


# Torch's trees do the same in ten times the time, which shows beside the steps of a small network.


def _collect(value: Any, leaves: list[Tensor], names: list[str]) -> None:
    """The tensors in nested dicts and tuples, in order, and the names in them."""
    if isinstance(value, Tensor):
        leaves.append(value)
    elif isinstance(value, dict):
        names.extend(value)
        names.append("")  # ends the dict
        for part in value.values():
            _collect(part, leaves, names)
    else:
        for part in value:
            _collect(part, leaves, names)


def _like(value: Any, leaves: Iterator[Tensor]) -> Any:
    """The same dicts and tuples with other tensors."""
    if isinstance(value, dict):
        return {name: _like(part, leaves) for name, part in value.items()}
    if isinstance(value, tuple):
        return tuple([_like(part, leaves) for part in value])
    return next(leaves)


def _signature(leaves: list[Tensor]) -> list[Any]:
    return [(leaf.shape, leaf.dtype, leaf.device) for leaf in leaves]


def _autocast(leaves: list[Tensor]) -> Any:
    device = leaves[0].device.type
    if not torch.amp.is_autocast_available(device):
        return False
    return torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)


def _is_short(leaves: list[Tensor]) -> bool:
    """Whether there are 16-bit floating-point numbers in it."""
    return bool(_autocast(leaves)) or any(leaf.dtype == torch.bfloat16 for leaf in leaves)


def _is_transformed(leaf: Tensor) -> bool:
    """Whether derivatives are taken of it; a recording has none of its own."""
    return torch._C._functorch.is_functorch_wrapped_tensor(leaf) or leaf.requires_grad


def _random_states() -> tuple[Any, ...]:
    cuda = [state.tolist() for state in torch.cuda.get_rng_state_all()] if torch.cuda.is_available() else []
    numpy = sys.modules.get("numpy")
    return random.getstate(), str(numpy.random.get_state()) if numpy else "", torch.get_rng_state().tolist(), cuda


@contextmanager
def _restored_random_states() -> Iterator[None]:
    """Put Python's and numpy's random states back at the end, as `torch.random.fork_rng` does torch's."""
    numpy = sys.modules.get("numpy")
    states = random.getstate(), numpy.random.get_state() if numpy else None
    try:
        yield
    finally:
        random.setstate(states[0])
        if numpy:
            numpy.random.set_state(states[1])


def _cuda_devices(args: Any) -> set[torch.device]:
    return {leaf.device for leaf in tree_flatten(args)[0] if leaf.device.type == "cuda"}


def _wide(function: Function, args: Any) -> tuple[Any, Any] | None:
    """Arguments and result in float64; None where they are so, or where parts of the network are not among them."""
    if not any(leaf.dtype == torch.float32 for leaf in tree_flatten(args)[0]):
        return None
    wide = tree_map(lambda leaf: leaf.double() if leaf.is_floating_point() else leaf, args)
    try:
        return wide, function(*wide)
    except RuntimeError:  # frozen parameters, say, stay as they are
        return None


def _compare(found: Any, expected: Any, most: float, each: float) -> None:
    """Raise ValueError where a part of the result is off by more than `most` for half of the tasks, or `each` for one.

    Each part, such as the gradients of all parameters, is measured by its norm; one that is not by task as a whole, by
    `each`.
    """
    for a, b in zip(_parts(found), _parts(expected), strict=True):
        tasks = {len(t) for t in b.values()}
        if len(tasks) == 1:
            each_task = range(tasks.pop())
            errors = sorted(_error({n: t[i] for n, t in a.items()}, {n: t[i] for n, t in b.items()}) for i in each_task)
        else:
            errors = [_error(a, b)] if b else []
        allowed = most if len(errors) > 1 else each
        if errors and not (errors[(len(errors) - 1) // 2] <= allowed and errors[-1] <= each):
            raise ValueError(f"what is recorded is off by {errors[-1]:.1e} of its norm")


def _parts(result: Any) -> list[Tree]:
    parts = result if isinstance(result, tuple) else (result,)
    leaves = ([t for t in tree_flatten(part)[0] if t.is_floating_point() and t.dim()] for part in parts)
    return [{str(n): t.double() for n, t in enumerate(part)} for part in leaves]


def _error(found: Tree, expected: Tree) -> float:
    error, scale = difference(found, expected)
    return (error / scale.clamp_min(torch.finfo(scale.dtype).tiny)).item()


@cache
def _opaque_batch_norm() -> dict[Any, Any]:
    """Batch norm as operations that its compiler calls instead of writing its own, slower on CPUs."""

    @torch.library.custom_op("fomal::batch_norm", mutates_args=())
    def forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        found: tuple[Tensor, Tensor, Tensor] = aten.native_batch_norm(x, weight, bias, None, None, True, 0.0, eps)
        return found

    @torch.library.custom_op("fomal::batch_norm_backward", mutates_args=())
    def backward(
        gradient: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        found: tuple[Tensor, Tensor, Tensor] = aten.native_batch_norm_backward(
            gradient, x, weight, None, None, mean, rstd, True, eps, [True, True, True]
        )
        return found

    forward.register_fake(lambda x, w, b, eps: (torch.empty_like(x), torch.empty_like(w), torch.empty_like(w)))
    backward.register_fake(lambda g, x, w, m, r, eps: (torch.empty_like(x), torch.empty_like(w), torch.empty_like(w)))
    return {
        aten.native_batch_norm.default: (torch.ops.fomal.batch_norm.default, (0, 1, 2, 7)),
        aten.native_batch_norm_backward.default: (torch.ops.fomal.batch_norm_backward.default, (0, 1, 2, 5, 6, 8)),
    }


def keep_batch_norm(module: GraphModule) -> GraphModule:
    """Hide the batch norms of a recording from the compiler."""
    for node in module.graph.nodes:
        if node.target in _opaque_batch_norm():
            node.target, kept = _opaque_batch_norm()[node.target]
            node.args = tuple(node.args[i] for i in kept)
    module.recompile()
    return module
