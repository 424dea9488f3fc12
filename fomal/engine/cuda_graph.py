"""Work on a device, captured once as a CUDA graph and replayed."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fomal.engine.backend import Backend, deviation
from fomal.utils.pytree import flatten, leaves, skeleton, unflatten

Replay = Callable[[], Sequence[Tensor]]
Function = Callable[[list[Tensor]], list[Tensor]]
Capture = Callable[[Function, list[Tensor]], Replay]
"""Runs a function of some tensors and returns what repeats its operations on whatever these tensors hold by then."""

WARM_UP = 3  # runs before a capture, as torch asks for: libraries choose algorithms and allocate in them
MOST = 8  # graphs, each of which keeps its memory


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
    """What was captured, with the tensors it reads and the form of its result."""

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


class Captured(Backend):
    """A function of tensors in nested dicts and tuples, captured.

    One graph is captured for each key, see `Backend`: on the inputs at hand, and on others in place of every one of
    them, a replay must give what the plain function gives. A result owns its memory.

    Args:
        function: of tensors alone; what else it depends on is the network and in `settings`, and does not change in
            place.
        vary: other inputs in place of given ones, with other values of every tensor that the result depends on: what a
            capture holds on to shows with them.
        network: that it uses.
        name: of the function, for the message.
        settings: returns the values of the host that `function` depends on, hashable.
        capture: how to capture.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        vary: Callable[..., tuple[Any, ...]],
        network: nn.Module,
        name: str,
        settings: Callable[[], Any],
        capture: Capture,
    ) -> None:
        draws = "it draws random numbers from torch's generator, as dropout does"
        super().__init__(network, f"{name} are not captured: %s", draws, "capture", storages=True)
        self.function, self.vary, self.settings, self.capture = function, vary, settings, capture

    def beside(self) -> Any:
        """See `Backend`."""
        return self.settings()

    def __call__(self, *inputs: Any) -> Any:
        """The function's result."""
        if not self.reason:
            self.look()
        if self.reason:
            return self.function(*inputs)
        tensors, form = flatten(inputs)
        key = self.key(self.settings(), form, tensors)
        if key not in self.ways and len(self.ways) == MOST:
            self.give_up(f"it is given more than {MOST} kinds of inputs")
        graph = self.way(key, lambda: self.function(*inputs), lambda expected: self._proven(inputs, expected), inputs)
        return self.function(*inputs) if graph is None else graph(tensors)

    def _proven(self, inputs: tuple[Any, ...], expected: Any) -> _Graph:
        """A graph, compared with the plain function."""
        try:
            graph = self._captured(inputs)
        except Exception as error:
            raise error.__context__ or error from None  # ending a capture fails too, after what spoilt it
        others = self.vary(*inputs)
        self._compare(graph, inputs, expected)
        self._compare(graph, others, self.function(*others))
        return graph

    def _captured(self, inputs: tuple[Any, ...]) -> _Graph:
        buffers = [t.detach().clone() for t in leaves(inputs)]
        results = []  # for their form

        def flat(tensors: list[Tensor]) -> list[Tensor]:
            results.append(skeleton(found := self.function(*unflatten(inputs, tensors))))
            return leaves(found)

        with _no_cast_kept():
            replay = self.capture(flat, buffers)
        return _Graph(buffers, replay, results[-1])

    def _compare(self, graph: _Graph, inputs: tuple[Any, ...], expected: Any) -> None:
        """Raise ValueError where a replay differs from the plain result; some sums of GPUs vary in order, each time."""
        if off := deviation(graph(leaves(inputs)), expected, self.function(*inputs)):
            raise ValueError(f"a replay is off by {off[1]:.1e} of the result's norm")


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
