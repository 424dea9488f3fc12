"""Check that a pair computes the same, then time it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tests.benchmarks import ours
from tests.benchmarks.peers import PEERS, Peer
from tests.benchmarks.works import Work

PRECISIONS = (torch.float64, torch.float32)  # the one that is timed last


def tolerance(dtype: torch.dtype) -> float:
    """By how much, relative to their norm, what the two sides compute may differ.

    In float64 it tells whether they compute the same; TorchOpt corrects Adam's bias in float32 all the same. In float32
    it tells that nothing is grossly off: rounding that takes one ReLU over its bend changes all gradients below it, and
    Adam without momentum makes a whole step of any gradient, however small.
    """
    return 1e-5 if dtype == torch.float64 else 0.2


CHECKED_ITERATIONS = 2  # of "fit"
WARM_UP = 2  # rounds that do not count

Run = Callable[[], dict[str, Tensor]]

FAILURES = (RuntimeError, TypeError, AttributeError, ValueError, ImportError, FloatingPointError)
"""Of an old peer, of memory, or of a way to run that cannot be had."""


def difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """The norm of the difference of two updates over the norm of the second."""
    if set(ours) != set(theirs):
        raise ValueError(f"the updates have other names: {sorted(set(ours) ^ set(theirs))}")
    a, b = (torch.cat([t[name].detach().flatten().double().cpu() for name in sorted(ours)]) for t in (ours, theirs))
    return float((a - b).norm() / b.norm())


def sides(work: Work, kind: str, peer: Peer, prepare: Callable[..., Run] | None = None) -> tuple[Run, Run]:
    """fomal's and the peer's, ready to run; `prepare` is the peer's, which does not depend on how fomal runs."""
    theirs = (prepare or peer.prepare)(replace(work, run_as="traced"), kind)
    return ours.prepare(work, kind, peer.optimizers[kind]), theirs


def spread(values: list[float]) -> dict[str, float]:
    """Median and range."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def alternate(sides: Sequence[Run], rounds: int, device: str) -> list[list[float]]:
    """Seconds of each, in turn."""

    def seconds(run: Run) -> float:
        started = time.perf_counter()
        run()
        ours.synchronise(device)
        return time.perf_counter() - started

    return [found[WARM_UP:] for found in in_turn([partial(seconds, run) for run in sides], WARM_UP + rounds)]


def in_turn(clocks: Sequence[Callable[[], float]], rounds: int) -> list[list[float]]:
    """What each returns, round by round; every second round goes backwards."""
    found: list[list[float]] = [[] for _ in clocks]
    places = range(len(clocks))
    for number in range(rounds):
        for place in places if number % 2 == 0 else reversed(places):
            found[place].append(clocks[place]())
    return found


def operations(work: Work, kind: str) -> int:
    """What the plain loop multiplies and adds in matrix products and convolutions."""
    counted = replace(work, fit_iterations=1)
    run = PEERS["loop"].prepare(counted, kind)
    with FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops()) * (work.fit_iterations if kind == "fit" else 1)


def attempt(
    row: dict[str, Any], work: Work, kind: str, run: Callable[[], dict[str, Any]], reason: str | None = None
) -> dict[str, Any]:
    """The row with what `run` finds, or with why there is nothing."""
    reason = work.without(kind) or reason
    if reason is not None:
        return {**row, "status": "not offered", "reason": reason}
    try:
        return {**row, **run()}
    except FAILURES as error:
        message = (str(error).splitlines() or [""])[0]
        return {**row, "status": "failed", "reason": f"{type(error).__name__}: {message}"}


def compare(
    work: Work, kind: str, peer: Peer, run_as: Sequence[str], rounds: int, peak: float
) -> Iterator[dict[str, Any]]:
    """A row for each way in which fomal runs.

    Args:
        work: the work.
        kind: what of it.
        peer: another way to do it, which is made ready once.
        run_as: the ways.
        rounds: how often.
        peak: the machine's rate of matrix products, in operations per second.

    Returns:
        Work, rule, way, peer and status; where that is "timed" or "differs", the relative differences too; where it is
        "timed", `figures`; otherwise the reason.
    """
    prepare = cache(peer.prepare)
    for way in run_as:
        made = replace(work, run_as=way)
        row = {"work": work.name, "rule": kind, "as": way, "peer": peer.name}
        reason = None if kind in peer.optimizers else "the peer has no such form"
        yield attempt(row, made, kind, partial(pair_row, made, kind, peer, prepare, rounds, peak), reason)


def pair_row(
    work: Work, kind: str, peer: Peer, prepare: Callable[..., Run], rounds: int, peak: float
) -> dict[str, Any]:
    """Check that the two compute the same, then time them."""
    found: dict[str, Any] = {"optimizer": peer.optimizers[kind], "difference": {}}
    for dtype in PRECISIONS:
        pair = sides(replace(work, dtype=dtype, fit_iterations=CHECKED_ITERATIONS), kind, peer, prepare)
        apart = found["difference"][str(dtype).removeprefix("torch.")] = difference(pair[0](), pair[1]())
        if not apart <= tolerance(dtype):
            return {**found, "status": "differs", "reason": "the updates are not the same: not timed"}
    if kind == "fit":
        pair = sides(work, kind, peer, prepare)
    mine, theirs = alternate(pair, rounds, work.device)
    return {**found, "status": "timed", **figures(work, kind, mine, theirs, peak)}


def figures(work: Work, kind: str, mine: list[float], theirs: list[float], peak: float) -> dict[str, Any]:
    """The times, and what follows from them."""
    count, median = operations(work, kind), statistics.median(mine)
    tasks = len(work.episode(kind).number) * (work.fit_iterations if kind == "fit" else 1)
    return {
        "fomal_seconds": spread(mine),
        "peer_seconds": spread(theirs),
        "peer_over_fomal": spread([b / a for a, b in zip(mine, theirs, strict=True)]),
        "tasks": tasks,
        "operations": count,
        "fomal_flops": count / median,
        "fomal_share_of_peak": count / median / peak,
        "fomal_tasks_per_second": tasks / median,
        "peer_tasks_per_second": tasks / statistics.median(theirs),
    }
