"""Check that a pair computes the same, then time it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
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


def difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """The norm of the difference of two updates over the norm of the second."""
    if set(ours) != set(theirs):
        raise ValueError(f"the updates have other names: {sorted(set(ours) ^ set(theirs))}")
    a, b = (torch.cat([t[name].detach().flatten().double().cpu() for name in sorted(ours)]) for t in (ours, theirs))
    return float((a - b).norm() / b.norm())


def sides(work: Work, kind: str, peer: Peer) -> tuple[Run, Run]:
    """fomal's and the peer's, ready to run."""
    return ours.prepare(work, kind, peer.optimizers[kind]), peer.prepare(work, kind)


def spread(values: list[float]) -> dict[str, float]:
    """Median and range."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def alternate(pair: tuple[Run, Run], rounds: int, device: str) -> tuple[list[float], list[float]]:
    """Seconds of both, in turn; who begins changes from round to round."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for number in range(WARM_UP + rounds):
        for side in (0, 1) if number % 2 == 0 else (1, 0):
            started = time.perf_counter()
            pair[side]()
            ours.synchronise(device)
            seconds[side].append(time.perf_counter() - started)
    return seconds[0][WARM_UP:], seconds[1][WARM_UP:]


def operations(work: Work, kind: str) -> int:
    """What the plain loop multiplies and adds in matrix products and convolutions."""
    counted = replace(work, fit_iterations=1)
    run = PEERS["loop"].prepare(counted, kind)
    with FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops()) * (work.fit_iterations if kind == "fit" else 1)


def compare(work: Work, kind: str, peer: Peer, rounds: int, peak: float) -> dict[str, Any]:
    """One row.

    Args:
        work: the work.
        kind: what of it.
        peer: another way to do it.
        rounds: how often.
        peak: the machine's rate of matrix products, in operations per second.

    Returns:
        Work, rule, peer and status; where that is "timed" or "differs", the relative differences too; where it is
        "timed", `figures`; otherwise the reason.
    """
    row: dict[str, Any] = {"work": work.name, "rule": kind, "peer": peer.name}
    reason = work.without(kind)
    if reason is None and kind not in peer.optimizers:
        reason = "the peer has no such form"
    if reason is not None:
        return {**row, "status": "not offered", "reason": reason}
    row["optimizer"] = peer.optimizers[kind]
    row["difference"] = {}
    try:
        for dtype in PRECISIONS:
            pair = sides(replace(work, dtype=dtype, fit_iterations=CHECKED_ITERATIONS), kind, peer)
            apart = row["difference"][str(dtype).removeprefix("torch.")] = difference(pair[0](), pair[1]())
            if not apart <= tolerance(dtype):
                return {**row, "status": "differs", "reason": "the updates are not the same: not timed"}
        mine, theirs = alternate(sides(work, kind, peer) if kind == "fit" else pair, rounds, work.device)
    except (RuntimeError, TypeError, AttributeError, ValueError, ImportError) as error:  # of an old peer, or of memory
        message = (str(error).splitlines() or [""])[0]
        return {**row, "status": "failed", "reason": f"{type(error).__name__}: {message}"}
    return {**row, "status": "timed", **figures(work, kind, mine, theirs, peak)}


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
