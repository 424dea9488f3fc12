"""The device's part of a meta-iteration, captured once as a CUDA graph and replayed."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from fomal.checks import first_line
from fomal.data.episode import Episode, Numbers
from fomal.inner.optimizer import SHARED, State
from fomal.inner.recorded import NARROW_TOLERANCE, WIDE_TOLERANCE
from fomal.meta_iteration import MetaGradient
from fomal.tree import Tree, difference

log = logging.getLogger(__name__)

Inputs = tuple[Episode | Numbers, Tree, State]
Replay = Callable[[], Sequence[Tensor]]
Function = Callable[[list[Tensor]], list[Tensor]]
Capture = Callable[[Function, list[Tensor]], Replay]
"""Runs a function of some tensors and returns what repeats its operations on whatever these tensors hold by then."""

WARM_UP = 3  # runs before a capture, as torch asks for: libraries choose algorithms and allocate in them
MOST = 8  # graphs, each of which keeps its memory
TOLERANCE = {torch.float64: WIDE_TOLERANCE, torch.float32: NARROW_TOLERANCE}
SPREAD = 10
"""How many times as far from the plain run a replay may be as a second plain run is: some GPU sums vary in order."""


def cuda_graph(function: Function, buffers: list[Tensor]) -> Replay:
    """Capture on the present device, with memory of the graph's own.

    Raises:
        RuntimeError: an operation waits for the device, or cannot be captured.
    """
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP - 1):
            function(buffers)
        with _waiting_refused():  # here, since a capture that fails leaves torch's generators unusable
            function(buffers)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # Other threads, e.g. those that pin memory and watch NCCL, go on as they please.
    here = torch.cuda.stream(torch.cuda.current_stream())  # a capture that fails leaves its own stream in place
    with here, torch.cuda.graph(graph, capture_error_mode="thread_local"):
        outputs = function(buffers)

    def replay() -> Sequence[Tensor]:
        graph.replay()
        return outputs

    return replay


@contextmanager
def _waiting_refused() -> Iterator[None]:
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode")  # that it does not see everything
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(mode)


CAPTURES: dict[str, Capture] = {"cuda": cuda_graph}
"""How a kind of device captures."""


@dataclass
class _Graph:
    """What was captured for inputs of one signature, with the tensors it reads and the form of its result."""

    signature: Any
    buffers: list[Tensor]
    replay: Replay
    form: TreeSpec

    @torch.no_grad()
    def __call__(self, tensors: Sequence[Tensor]) -> MetaGradient:
        _copy(self.buffers, tensors)
        outputs = self.replay()
        own = [torch.empty_like(t) for t in outputs]  # the next replay writes over `outputs`
        _copy(own, outputs)
        return tree_unflatten(own, self.form)  # type: ignore[no-any-return]


class CapturedGradient:
    """A function from a meta-batch, the initialisation and the carried state to the meta-gradient, captured.

    One graph is captured for each signature: names, shapes, dtypes, autocast, and all that is no tensor. It is proven
    at its first use: on the inputs at hand, and on others in place of every one of them, a replay must give what the
    plain function gives. Otherwise, where it cannot be captured, and where it draws from torch's generators, the
    function is run plainly from then on, and one line says why. A result owns its memory.

    Args:
        function: of tensors alone; what else it depends on is in `settings`, and does not change in place.
        network: what it runs, for the message.
        settings: returns the values of the host that `function` depends on.
        capture: how to capture.

    Attributes:
        reason: why it runs plainly; empty where it does not.
    """

    def __init__(
        self, function: Callable[..., MetaGradient], network: nn.Module, settings: Callable[[], Any], capture: Capture
    ) -> None:
        self.function, self.network, self.settings, self.capture = function, network, settings, capture
        self.reason = ""
        self._graphs: list[_Graph] = []

    def __call__(self, batch: Episode | Numbers, phi: Tree, state: State) -> MetaGradient:
        """The meta-gradient of a meta-batch from the initialisation `phi` and the carried inner state."""
        inputs = (batch, phi, state)
        if self.reason:
            return self.function(*inputs)
        tensors = _tensors(inputs)
        signature = (_signature(inputs, tensors), self.settings())
        for graph in self._graphs:
            if graph.signature == signature:
                return graph(tensors)
        return self._first(inputs, signature)

    def forget(self) -> None:
        """Free the graphs and their memory."""
        self._graphs = []

    def _first(self, inputs: Inputs, signature: Any) -> MetaGradient:
        """The plain result; then capture and prove."""
        device = inputs[0].number.device
        before = _generators(device)
        found = self._known_finite(inputs)
        if not found.is_finite():
            return found  # there is nothing to compare
        if _generators(device) != before:
            reason = "it draws random numbers from torch's generator, as dropout does"
        elif len(self._graphs) == MOST:
            reason = f"it is given more than {MOST} kinds of meta-batches"
        else:
            reason = self._try(inputs, signature)
        if reason:
            self.reason = reason
            self.forget()
            log.warning("Meta-iterations of %s are not captured: %s", type(self.network).__name__, reason)
        return found

    def _try(self, inputs: Inputs, signature: Any) -> str:
        """Capture; why that cannot be used, or nothing."""
        try:
            graph = self._captured(inputs, signature)
            reason = self._wrong(graph, inputs) or self._wrong(graph, another(inputs))
        except Exception as error:  # capturing raises many kinds, and users' modules any
            return first_line(error.__context__ or error)  # ending a capture fails too, after what spoilt it
        if not reason:
            self._graphs.append(graph)
        return reason

    def _captured(self, inputs: Inputs, signature: Any) -> _Graph:
        buffers = [t.detach().clone() for t in _tensors(inputs)]
        forms = []

        def flat(tensors: list[Tensor]) -> list[Tensor]:
            leaves, form = tree_flatten(self._known_finite(_with_tensors(inputs, tensors)))
            forms.append(form)
            return leaves

        with _no_cast_kept():
            replay = self.capture(flat, buffers)
        return _Graph(signature, buffers, replay, forms[-1])

    def _known_finite(self, inputs: Inputs) -> MetaGradient:
        found = self.function(*inputs)
        return found._replace(finite=found.is_finite())

    def _wrong(self, graph: _Graph, inputs: Inputs) -> str:
        """How a replay differs from the plain result, in words; empty where it equals it up to rounding."""
        results = graph(_tensors(inputs)), self.function(*inputs), self.function(*inputs)
        parts = (_parts(result) for result in results)
        for found, expected, again in zip(*parts, strict=True):
            error, scale = difference(found, expected)
            tolerance = TOLERANCE.get(next(iter(expected.values())).dtype, 0.1) * scale
            spread = SPREAD * difference(again, expected)[0]
            if not error <= torch.maximum(tolerance, torch.minimum(spread, 0.1 * scale)):
                return f"a replay is off by {error / scale:.1e} of the result's norm"
        return ""


def another(inputs: Inputs) -> Inputs:
    """Other values of every tensor that a meta-gradient depends on: what a capture holds on to shows with them."""
    batch, phi, state = inputs
    if isinstance(batch, Episode):
        batch = batch.map(lambda t: 0.9 * t if t.is_floating_point() else t)
    batch = batch._replace(number=batch.number + 1000)
    state = {
        part: {name: t + 3 if part == SHARED else 0.9 * t + 0.01 for name, t in values.items()}
        for part, values in state.items()
    }
    return batch, {name: 0.9 * p + 0.01 for name, p in phi.items()}, state


def _tensors(inputs: Inputs) -> list[Tensor]:
    batch, phi, state = inputs
    of_batch = [value for value in batch if isinstance(value, Tensor)]
    return [*of_batch, *phi.values(), *(t for values in state.values() for t in values.values())]


def _with_tensors(inputs: Inputs, tensors: Sequence[Tensor]) -> Inputs:
    left = iter(tensors)
    batch, phi, state = inputs
    batch = type(batch)._make(next(left) if isinstance(value, Tensor) else value for value in batch)
    phi = {name: next(left) for name in phi}
    return batch, phi, {part: {name: next(left) for name in values} for part, values in state.items()}


def _signature(inputs: Inputs, tensors: Sequence[Tensor]) -> Any:
    batch, phi, state = inputs
    constants = [value for value in batch if not isinstance(value, Tensor)]
    names = [*phi, *((part, *values) for part, values in state.items())]
    kind = batch.number.device.type
    cast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)
    return type(batch), constants, names, [(t.shape, t.dtype, t.device) for t in tensors], cast, torch.is_grad_enabled()


def _parts(found: MetaGradient) -> list[Tree]:
    """What a meta-gradient says, in parts that are each compared by their own norm."""
    state = [
        {name: t if t.is_floating_point() else t.double() for name, t in values.items()}
        for values in found.state.values()
    ]
    return [part for part in (found.gradient, {"": found.losses}, *state) if part]


def _copy(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy, in one launch for each dtype."""
    pairs: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
    for target, source in zip(targets, sources, strict=True):
        to, of = pairs.setdefault(target.dtype, ([], []))
        to.append(target)
        of.append(source)
    for to, of in pairs.values():
        torch._foreach_copy_(to, of)


@contextmanager
def _no_cast_kept() -> Iterator[None]:
    """Without autocast's cache, whose casts of parameters would be constants of a graph."""
    before = torch.is_autocast_cache_enabled()
    torch.clear_autocast_cache()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


def _generators(device: torch.device) -> list[list[int]]:
    """The states of torch's generators, which are on the host."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return [state.tolist() for state in states]
