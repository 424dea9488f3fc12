"""Work on a device, captured once as a CUDA graph and replayed."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fomal.engine.tracing import NARROW_TOLERANCE, WIDE_TOLERANCE
from fomal.utils.checks import first_line
from fomal.utils.pytree import flatten, parts, signature, skeleton, unflatten
from fomal.utils.tree import difference

log = logging.getLogger(__name__)

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
    form: Any

    @torch.no_grad()
    def __call__(self, tensors: Sequence[Tensor]) -> Any:
        _copy(self.buffers, tensors)
        outputs = self.replay()
        own = [torch.empty_like(t) for t in outputs]  # the next replay writes over `outputs`
        _copy(own, outputs)
        return unflatten(self.form, own)


class Captured:
    """A function of tensors in nested dicts and tuples, captured.

    One graph is captured for each signature: names, shapes, dtypes, autocast, and all that is no tensor. It is proven
    at its first use: on the inputs at hand, and on others in place of every one of them, a replay must give what the
    plain function gives. Otherwise, where it cannot be captured, and where it draws from torch's generators, the
    function is run plainly from then on, and one line says why. A result owns its memory.

    Args:
        function: of tensors alone; what else it depends on is in `settings`, and does not change in place.
        vary: other inputs in place of given ones, with other values of every tensor that the result depends on: what a
            capture holds on to shows with them.
        name: of the function, for the message.
        settings: returns the values of the host that `function` depends on.
        capture: how to capture.

    Attributes:
        reason: why it runs plainly; empty where it does not.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        vary: Callable[..., tuple[Any, ...]],
        name: str,
        settings: Callable[[], Any],
        capture: Capture,
    ) -> None:
        self.function, self.vary, self.name, self.settings, self.capture = function, vary, name, settings, capture
        self.reason = ""
        self._graphs: list[_Graph] = []

    def __call__(self, *inputs: Any) -> Any:
        """The function's result."""
        if self.reason:
            return self.function(*inputs)
        tensors, form = flatten(inputs)
        key = (form, signature(tensors), torch.is_grad_enabled(), self.settings())
        for graph in self._graphs:
            if graph.signature == key:
                return graph(tensors)
        return self._first(inputs, key)

    def forget(self) -> None:
        """Free the graphs and their memory."""
        self._graphs = []

    def _first(self, inputs: tuple[Any, ...], key: Any) -> Any:
        """The plain result; then capture and prove."""
        device = flatten(inputs)[0][0].device
        before = _generators(device)
        found = self.function(*inputs)
        if not all(t.isfinite().all() for t in flatten(found)[0]):
            return found  # there is nothing to compare
        if _generators(device) != before:
            reason = "it draws random numbers from torch's generator, as dropout does"
        elif len(self._graphs) == MOST:
            reason = f"it is given more than {MOST} kinds of inputs"
        else:
            reason = self._try(inputs, key)
        if reason:
            self.reason = reason
            self.forget()
            log.warning("%s are not captured: %s", self.name, reason)
        return found

    def _try(self, inputs: tuple[Any, ...], key: Any) -> str:
        """Capture; why that cannot be used, or nothing."""
        try:
            graph = self._captured(inputs, key)
            reason = self._wrong(graph, inputs) or self._wrong(graph, self.vary(*inputs))
        except Exception as error:  # capturing raises many kinds, and users' modules any
            return first_line(error.__context__ or error)  # ending a capture fails too, after what spoilt it
        if not reason:
            self._graphs.append(graph)
        return reason

    def _captured(self, inputs: tuple[Any, ...], key: Any) -> _Graph:
        buffers = [t.detach().clone() for t in flatten(inputs)[0]]
        results = []  # for their form

        def flat(tensors: list[Tensor]) -> list[Tensor]:
            results.append(skeleton(found := self.function(*unflatten(inputs, tensors))))
            return flatten(found)[0]

        with _no_cast_kept():
            replay = self.capture(flat, buffers)
        return _Graph(key, buffers, replay, results[-1])

    def _wrong(self, graph: _Graph, inputs: tuple[Any, ...]) -> str:
        """How a replay differs from the plain result, in words; empty where it equals it up to rounding."""
        results = graph(flatten(inputs)[0]), self.function(*inputs), self.function(*inputs)
        for found, expected, again in zip(*map(parts, results), strict=True):
            error, scale = difference(found, expected)
            tolerance = TOLERANCE.get(next(iter(expected.values())).dtype, 0.1) * scale
            spread = SPREAD * difference(again, expected)[0]
            if not error <= torch.maximum(tolerance, torch.minimum(spread, 0.1 * scale)):
                return f"a replay is off by {error / scale:.1e} of the result's norm"
        return ""


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
