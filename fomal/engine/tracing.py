"""A function over all tasks as a flat list of torch operations, traced once for each shape and then replayed."""

from __future__ import annotations

import logging
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.fx import GraphModule

from fomal.engine.functional import full_precision, helpers, is_short, with_helpers
from fomal.engine.kernels import StackedOperations
from fomal.utils.checks import first_line
from fomal.utils.fingerprint import Snapshot, changes, settings
from fomal.utils.pytree import autocast_dtype, flatten, map_leaves, signature, skeleton, unflatten
from fomal.utils.tree import Tree, difference

log = logging.getLogger(__name__)

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
SPREAD = 10
"""How many times as far off as rounding alone takes the plain function a trace may be, up to a part of the norm."""
LARGEST = 0.02
"""That part, for most of the tasks."""
MOST_CHANGES = 20
"""How often a network may change before trace it stops, since each trace takes a second or more."""


class Tracer:
    """Traces functions of a network over all tasks, and replays them.

    `torch.func.vmap` and `grad` are gone from a trace: what is left are their operations on stacked tensors, with
    those of `fomal.engine.kernels` among them. A trace is compared with the function itself before it is used, in
    float64 and in the working precision, for each shape; where it cannot be made or differs, functions run as they are
    written from then on, and one line says why. Results differ by rounding.

    Whatever the network's forward does beside torch operations happens once only, so it must be the same each time.
    A network that draws random numbers, that has hooks, or that changes its own attributes is not traced. Where a
    network has changed, in its modules, their settings or hooks, it is traced again; frozen parameters and buffers
    are read at each replay.

    Args:
        network: the network.
        wanted: False runs everything as it is written; None traces a network made of known modules alone.
        compiled: hand traces to `torch.compile`.
        losses: what the functions use beside the network.
    """

    def __init__(
        self,
        network: nn.Module,
        wanted: bool | None = None,
        compiled: bool = False,
        losses: Sequence[object] = (),
    ) -> None:
        self.network, self.losses = network, losses
        self.compiled = compiled
        self.reason = ""  # why functions run as they are written
        self.wanted = wanted
        self.is_on = wanted is not False
        self._changes = 0
        self._forget()

    def __getstate__(self) -> dict[str, Any]:
        """Without traces, which a copy or another process makes for itself."""
        return {name: value for name, value in vars(self).items() if name not in ("_traces", "_seen", "_others")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """See `__getstate__`."""
        vars(self).update(state)
        self._forget()

    def _forget(self) -> None:
        self._traces: dict[Any, Trace] = {}
        self._seen: Snapshot | None = None  # the network that the traces are of
        self._others: dict[frozenset[str], Tree] = {}  # its tensors beside given parameters

    def __call__(self, name: Any, function: Function, *args: Any) -> Any:
        """`function(*args)`, a function of tensors with tasks in front.

        Args:
            name: tells functions apart, with all that they depend on beside their arguments and the network.
            function: any.
            args: tensors, in nested dicts and tuples; of these the first holds parameters by their names, in one dict
                or several.
        """
        if not self.is_on:
            return function(*args)
        modes = self._look()
        whole_args = (self._tensors(args[0]), *args)
        leaves, form = flatten(whole_args)
        if any(_is_transformed(leaf) for leaf in leaves):
            return function(*args)
        leaves = [leaf.contiguous() for leaf in leaves]
        key = (name, *form, *signature(leaves), modes)
        trace = self._traces.get(key)
        if trace is None:
            try:
                trace = self._traced(with_helpers(self.network, function), unflatten(whole_args, leaves))
            except torch.OutOfMemoryError:  # there may be room for fewer tasks
                raise
            except Exception as error:  # of the network, of trace, or of the compiler: many kinds
                self._give_up(first_line(error))
            if trace is None:
                return function(*args)
            self._traces[key] = trace
        return trace(leaves)

    def _look(self) -> tuple[bool, ...]:
        """Forget the traces of a network that has changed since; the training modes of its modules."""
        seen = self._seen
        now = Snapshot(self.network) if seen is None else seen.now()
        if seen is not None and now is not seen and seen.changed(now):
            self._changes += 1
            self._forget()
            if self._changes == MOST_CHANGES:
                self._give_up(f"it has changed {MOST_CHANGES} times, and is traced again after each change")
        self._seen = now
        return now.modes

    def _tensors(self, params: Tree | tuple[Tree, ...]) -> Tree:
        """The network's tensors beside given parameters."""
        given = frozenset(params) if isinstance(params, dict) else frozenset().union(*params)
        if given not in self._others:
            self._others[given] = helpers(self.network, set(given))
        wanted = torch.is_grad_enabled()
        return {slot: t if wanted and t.requires_grad else t.detach() for slot, t in self._others[given].items()}

    def _traced(self, function: Function, args: Any) -> Trace | None:
        """A trace, compared with the function; None where the result is not finite, and nothing can be compared."""
        if self.wanted is None and (unknown := _unknown(self.network, self.losses)):
            raise ValueError(
                f"{unknown} is not known to compute the same each time; model.execution.traced: true says that it does"
            )
        if (hooked := _hooked(self.network)) is not None:
            raise ValueError(f"{hooked or 'the network'} has hooks, which would run once only")
        leaves = flatten(args)[0]
        exact = nullcontext() if self.compiled else full_precision(leaves[0].device)  # the compiler keeps to settings
        with torch.random.fork_rng(_cuda_devices(args)), _restored_random_states(), exact:
            before, network, counts = _random_states(), Snapshot(self.network), [*map(changes, leaves)]
            losses = [*map(settings, self.losses)]
            expected = function(*args)
            if _random_states() != before:
                raise ValueError("the network draws random numbers")
            if network.changed(Snapshot(self.network)) or counts != [*map(changes, leaves)]:
                raise ValueError("its forward changes its own attributes or buffers, as a trace would once only")
            if losses != [*map(settings, self.losses)]:
                raise ValueError("the loss changes its own attributes, as a trace would once only")
            if not all(t.isfinite().all() for t in flatten(expected)[0]):
                return None
            if (wide := _wide(function, args)) is not None:
                _compare(make_trace(function, wide[0])(flatten(wide[0])[0]), wide[1], WIDE_TOLERANCE, WIDE_TOLERANCE)
            rough = wide or _shaken(function, args)
            trace = make_trace(function, args, self.compiled)
            is_narrow = _is_short(leaves) or is_short(self.network)
            most, each = (SHORT_TOLERANCE, 1.0) if is_narrow else (NARROW_TOLERANCE, BENT_TOLERANCE)
            _compare(trace(leaves), expected, most, each, rough[1])
        return trace

    def _give_up(self, reason: str) -> None:
        self.is_on = False
        self.reason = reason
        self._forget()
        log.warning(
            "%s runs as it is written, %s: %s; model.execution.traced: false says so beforehand",
            type(self.network).__name__,
            "not compiled" if self.compiled else "which is slower (same results)",
            reason,
        )


def make_trace(function: Function, args: Any, compiled: bool = False) -> Trace:
    """`function` as a list of operations on tensors with the shapes of `args`, which must be contiguous.

    Returns:
        A function of the tensors in `args`, one after the other.
    """
    from torch._guards import TracingContext, tracing
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    leaves, results = flatten(args)[0], []  # the results for their form

    def flat(*leaves: Tensor) -> list[Tensor]:
        results.append(skeleton(found := function(*unflatten(args, leaves))))
        return flatten(found)[0]

    # One mode for all fake tensors, of which the tracer would otherwise make one for each operation.
    context = TracingContext(FakeTensorMode(allow_fallback_kernels=True))
    with StackedOperations(), tracing(context):
        graph = make_fx(flat)(*leaves)
    module = GraphModule(graph, graph.graph)
    join_equals(module)
    run: Function = torch.compile(keep_batch_norm(module), dynamic=False) if compiled else module

    return lambda leaves: unflatten(results[-1], run(*leaves))


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


def _is_short(leaves: list[Tensor]) -> bool:
    """Tell whether there are 16-bit floating-point numbers in it."""
    return autocast_dtype(leaves[0].device.type) is not None or any(leaf.dtype == torch.bfloat16 for leaf in leaves)


def _is_transformed(leaf: Tensor) -> bool:
    """Tell whether derivatives are taken of it; a trace has none of its own."""
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
    return {leaf.device for leaf in flatten(args)[0] if leaf.device.type == "cuda"}


def _wide(function: Function, args: Any) -> tuple[Any, Any] | None:
    """Arguments and result in float64; None where they are so, or where parts of the network are not among them."""
    if not any(leaf.dtype == torch.float32 for leaf in flatten(args)[0]):
        return None
    wide = map_leaves(lambda leaf: leaf.double() if leaf.is_floating_point() else leaf, args)
    try:
        return wide, function(*wide)
    except Exception:  # of networks with types of their own
        return None


def _shaken(function: Function, args: Any) -> tuple[Any, Any]:
    """Arguments that differ by a rounding, and their result: how much of a difference rounding makes."""

    def shake(leaf: Tensor) -> Tensor:
        return leaf * (1 + torch.finfo(leaf.dtype).eps * torch.randn_like(leaf)) if leaf.is_floating_point() else leaf

    shaken = map_leaves(shake, args)
    return shaken, function(*shaken)


def _compare(found: Any, expected: Any, most: float, each: float, rough: Any = None) -> None:
    """Raise ValueError where a part of the result is off by more than `most` for half of the tasks, or `each` for one.

    Each part, such as the gradients of all parameters, is measured by its norm; one that is not by task as a whole, by
    `each`. Where `rough` is given, which differs from `expected` by rounding, more is allowed where it differs more.
    """
    parts = _parts(found), _parts(expected), _parts(expected if rough is None else rough)
    for a, b, c in zip(*parts, strict=True):
        errors, spread = _errors(a, b), _errors(c, b)
        if not errors:
            continue
        middle = (len(errors) - 1) // 2
        typical = max(most, min(SPREAD * spread[middle], LARGEST)) if len(errors) > 1 else each
        if not (errors[middle] <= typical and errors[-1] <= max(each, min(SPREAD * spread[-1], 0.5))):
            raise ValueError(
                f"what is traced is off by {errors[-1]:.1e} of its norm, where rounding takes it {spread[-1]:.1e}"
                if rough is not None
                else f"what is traced is off by {errors[-1]:.1e} of its norm"
            )


def _errors(found: Tree, expected: Tree) -> list[float]:
    """How far each task is off, in order of size; one number where the tensors are not by task."""
    tasks = {len(t) for t in expected.values()}
    if len(tasks) != 1:
        return [_error(found, expected)] if expected else []
    each = range(tasks.pop())
    return sorted(_error({n: t[i] for n, t in found.items()}, {n: t[i] for n, t in expected.items()}) for i in each)


def _parts(result: Any) -> list[Tree]:
    parts = result if isinstance(result, tuple) else (result,)
    leaves = ([t for t in flatten(part)[0] if t.is_floating_point() and t.dim()] for part in parts)
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
    """Hide the batch norms of a trace from the compiler."""
    for node in module.graph.nodes:
        if node.target in _opaque_batch_norm():
            node.target, kept = _opaque_batch_norm()[node.target]
            node.args = tuple(node.args[i] for i in kept)
    module.recompile()
    return module
