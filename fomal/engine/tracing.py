"""A function over all tasks as a flat list of torch operations, traced once for each shape and then replayed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.fx import GraphModule

from fomal.engine.backend import Backend, deviation, in_float64
from fomal.engine.functional import full_precision, helpers, is_short, with_helpers
from fomal.engine.kernels import StackedOperations
from fomal.utils.fingerprint import settings
from fomal.utils.pytree import autocast_dtype, flatten, leaves, map_leaves, skeleton, unflatten
from fomal.utils.tree import Tree

Function = Callable[..., Any]
Trace = Callable[[list[Tensor]], Any]
aten = torch.ops.aten

WIDE_TOLERANCE = 1e-9
"""How far a trace may be off in float64, relative to the norm: it sums in another order."""
NARROW_TOLERANCE = 1e-3
"""Likewise in the working precision, for most of the tasks, where rounding makes less of a difference."""
BENT_TOLERANCE = 0.1
"""Likewise for every task: where rounding takes one of its ReLUs over the bend, all gradients below it change."""
SHORT_TOLERANCE = 0.2
"""Likewise for most of the tasks in 16 bits, where a trace has them and torch under `vmap` has not."""


class Tracer(Backend):
    """Traces functions of a network over all tasks, and replays them.

    `torch.func.vmap` and `grad` are gone from a trace: what is left are their operations on stacked tensors, with
    those of `fomal.engine.kernels` among them. It is compared with the function, see `Backend`, in float64 and in the
    working precision; results differ by rounding. Whatever the network's forward does beside torch operations happens
    once only, so it must be the same each time; frozen parameters and buffers are read at each replay.

    Args:
        network: the network.
        wanted: False runs everything as it is written; None traces a network made of known modules alone.
        compiled: hand traces to `torch.compile`.
        losses: what the functions use beside the network.
    """

    passes = (torch.OutOfMemoryError,)  # there may be room for fewer tasks

    def __init__(
        self, network: nn.Module, wanted: bool | None = None, compiled: bool = False, losses: Sequence[object] = ()
    ) -> None:
        how = "not compiled" if compiled else "which is slower (same results)"
        line = f"{type(network).__name__} runs as it is written, {how}: %s"
        line += "; model.execution.traced: false says so beforehand"
        super().__init__(network, line, "the network draws random numbers", "trace")
        self.wanted, self.compiled, self.losses = wanted, compiled, losses

    @property
    def is_on(self) -> bool:
        """Tell whether functions are traced."""
        return self.wanted is not False and not self.reason

    def forget(self) -> None:
        """See `Backend`."""
        super().forget()
        self._others: dict[frozenset[str], Tree] = {}  # the network's tensors beside given parameters

    def beside(self) -> Any:
        """See `Backend`."""
        return [*map(settings, self.losses)]

    def __call__(self, name: Any, function: Function, *args: Any) -> Any:
        """`function(*args)`, a function of tensors with tasks in front.

        Args:
            name: tells functions apart, with all that they depend on beside their arguments and the network.
            function: any.
            args: tensors, in nested dicts and tuples; of these the first holds parameters by their names, in one dict
                or several.
        """
        if self.is_on:
            self.look()
        if not self.is_on:
            return function(*args)
        whole_args = (self._tensors(args[0]), *args)
        tensors, form = flatten(whole_args)
        if any(_is_transformed(t) for t in tensors):
            return function(*args)
        tensors = [t.contiguous() for t in tensors]
        key = self.key(name, form, tensors)
        trace = self.ways.get(key) or self._first(key, function, unflatten(whole_args, tensors))
        return function(*args) if trace is None else trace(tensors)

    def _first(self, key: Any, function: Function, args: Any) -> Trace | None:
        """The trace of a function, at its first use; `args` begin with the network's other tensors."""
        whole = with_helpers(self.network, function)
        if reason := self._unsuitable():
            self.give_up(reason)
        exact = nullcontext() if self.compiled else full_precision(leaves(args)[0].device)  # the compiler has settings
        with exact:
            return self.way(key, lambda: whole(*args), lambda expected: self._traced(whole, args, expected), args)  # type: ignore[no-any-return]

    def _unsuitable(self) -> str:
        """Why the network is not traced, as far as is seen beforehand; empty where it may be."""
        if self.wanted is None and (unknown := _unknown(self.network, self.losses)):
            remedy = "model.execution.traced: true says that it does"
            return f"{unknown} is not known to compute the same each time; {remedy}"
        hooked = _hooked(self.network)
        return "" if hooked is None else f"{hooked or 'the network'} has hooks, which would run once only"

    def _tensors(self, params: Tree | tuple[Tree, ...]) -> Tree:
        """The network's tensors beside given parameters."""
        given = frozenset(params) if isinstance(params, dict) else frozenset().union(*params)
        if given not in self._others:
            self._others[given] = helpers(self.network, set(given))
        wanted = torch.is_grad_enabled()
        return {slot: t if wanted and t.requires_grad else t.detach() for slot, t in self._others[given].items()}

    def _traced(self, function: Function, args: Any, expected: Any) -> Trace:
        """A trace, compared with the function."""
        given = leaves(args)
        wide = in_float64(function, args) if any(t.dtype == torch.float32 for t in given) else None
        if wide is not None:
            _compare(make_trace(function, wide[0])(leaves(wide[0])), wide[1], None, WIDE_TOLERANCE, WIDE_TOLERANCE)
        rough = wide[1] if wide else function(*map_leaves(_shaken, args))
        trace = make_trace(function, args, self.compiled)
        is_narrow = _is_short(given) or is_short(self.network)
        most, each = (SHORT_TOLERANCE, 1.0) if is_narrow else (NARROW_TOLERANCE, BENT_TOLERANCE)
        _compare(trace(given), expected, rough, most, each)
        return trace


def make_trace(function: Function, args: Any, compiled: bool = False) -> Trace:
    """`function` as a list of operations on tensors with the shapes of `args`, which must be contiguous.

    Returns:
        A function of the tensors in `args`, one after the other.
    """
    from torch._guards import TracingContext, tracing
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    results = []  # for their form

    def flat(*tensors: Tensor) -> list[Tensor]:
        results.append(skeleton(found := function(*unflatten(args, tensors))))
        return leaves(found)

    # One mode for all fake tensors, of which the tracer would otherwise make one for each operation.
    context = TracingContext(FakeTensorMode(allow_fallback_kernels=True))
    with StackedOperations(), tracing(context):
        graph = make_fx(flat)(*leaves(args))
    module = GraphModule(graph, graph.graph)
    join_equals(module)
    run: Function = torch.compile(keep_batch_norm(module), dynamic=False) if compiled else module
    return lambda tensors: unflatten(results[-1], run(*tensors))


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
    as much as the launch of an operation. Random operations are not traced; one that changes a tensor ends this.
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


def _hooked(network: nn.Module) -> str | None:
    """The name of a module with hooks that run with its forward or backward; None where there is none."""
    of_all = (hooks for name, hooks in vars(torch.nn.modules.module).items() if name.startswith("_global_"))
    if any(hooks for hooks in of_all if isinstance(hooks, dict)):
        return "every module"
    own = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return next((name for name, m in network.named_modules() if any(getattr(m, kind) for kind in own)), None)


def _unknown(network: nn.Module, losses: Sequence[object]) -> str:
    known = ("torch", "fomal", "torchvision", "timm")
    within = [part for loss in losses for part in getattr(loss, "__dict__", {}).values() if isinstance(part, nn.Module)]
    parts = [*losses, *(module for whole in (network, *within) for module in whole.modules())]
    return next((type(part).__name__ for part in parts if type(part).__module__.split(".")[0] not in known), "")


def _is_short(tensors: list[Tensor]) -> bool:
    """Tell whether there are 16-bit floating-point numbers in it."""
    return autocast_dtype(tensors[0].device.type) is not None or any(t.dtype == torch.bfloat16 for t in tensors)


def _is_transformed(t: Tensor) -> bool:
    """Tell whether derivatives are taken of it; a trace has none of its own."""
    return torch._C._functorch.is_functorch_wrapped_tensor(t) or t.requires_grad


def _shaken(t: Tensor) -> Tensor:
    """Numbers that differ by a rounding, to show how much of a difference rounding makes."""
    return t * (1 + torch.finfo(t.dtype).eps * torch.randn_like(t)) if t.is_floating_point() else t


def _compare(found: Any, expected: Any, rough: Any, most: float, each: float) -> None:
    """Raise ValueError where a part of the result is off by more than is allowed, see `deviation`."""
    if off := deviation(found, expected, rough, each, most):
        beside = "" if rough is None else f", where rounding takes it {off[2]:.1e}"
        raise ValueError(f"what is traced is off by {off[1]:.1e} of its norm{beside}")


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
    """Hide the batch norms of a trace from the compiler."""
    for node in module.graph.nodes:
        if node.target in _opaque_batch_norm():
            node.target, kept = _opaque_batch_norm()[node.target]
            node.args = tuple(node.args[i] for i in kept)
    module.recompile()
    return module
