"""What the machine can do: its rate of matrix products and its memory bandwidth, as torch reaches them."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from typing import Any

import torch

from tests.benchmarks.ours import synchronise


def pin(threads: int) -> None:
    """Confine this process to so many cores: JAX knows no other way; before torch and JAX start their threads."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    torch.set_num_threads(threads)


def best(run: Callable[[], object], device: str, seconds: float) -> float:
    """The shortest time of `run`, repeated for so many seconds."""
    run()
    shortest, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        synchronise(device)
        started = time.perf_counter()
        run()
        synchronise(device)
        shortest = min(shortest, time.perf_counter() - started)
    return shortest


def matrix_rate(device: str, seconds: float, size: int | None = None) -> float:
    """Operations per second of torch.mm in float32, on square matrices; a multiplication and an addition are two."""
    size = size or (8192 if device == "cuda" else 1024)
    a, b = (torch.rand(size, size, device=device) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * size**3 / best(lambda: torch.mm(a, b, out=out), device, seconds)


def copy_bandwidth(device: str, seconds: float, mib: int = 256) -> float:
    """Bytes per second, read and written, of a copy that no cache holds."""
    source = torch.rand(mib * 2**18, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / best(lambda: target.copy_(source), device, seconds)


def measure(device: str, seconds: float = 3.0) -> dict[str, Any]:
    """The machine and its rates."""
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else processor(),
        "threads": torch.get_num_threads(),
        "matrix_product_flops": matrix_rate(device, seconds),
        "copy_bytes_per_second": copy_bandwidth(device, seconds),
    }


def processor() -> str:
    """The processor's name, where Linux knows it."""
    try:
        with open("/proc/cpuinfo") as lines:
            names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()
