"""fomal under autocast to bfloat16 beside itself and the loop in 32 bits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from tests.benchmarks import ours
from tests.benchmarks.measure import alternate, attempt, difference, spread
from tests.benchmarks.peers import PEERS
from tests.benchmarks.works import Work

TOLERANCE = 0.5
"""How far the update may be from that of 32 bits, relative to the norm: 8 bits go through batch norms, and Adam makes a
whole step of any gradient. 0.01 to 0.4 is usual; an unrelated update of the same length is 1.4 away."""


def rows(work: Work, kind: str, run_as: Sequence[str], rounds: int) -> Iterator[dict[str, Any]]:
    """One for each way to run."""
    for way in run_as:
        made = replace(work, run_as=way)
        row = {"work": work.name, "rule": kind, "as": way, "precision": "bf16"}
        yield attempt(row, made, kind, partial(ratios, made, kind, rounds))


def ratios(work: Work, kind: str, rounds: int) -> dict[str, Any]:
    """Check that the update is about that of 32 bits, then time all three in turn."""
    loop, work = PEERS["loop"], replace(work, dtype=torch.float32)
    short, wide = (ours.prepare(replace(work, bf16=bf16), kind, loop.optimizers[kind]) for bf16 in (True, False))
    apart = {"bfloat16": difference(short(), wide())}
    if not apart["bfloat16"] <= TOLERANCE:
        return {"difference": apart, "status": "differs", "reason": "the updates are too far apart: not timed"}
    in_short, in_wide, looped = alternate((short, wide, loop.prepare(work, kind)), rounds, work.device)
    return {
        "difference": apart,
        "status": "timed",
        "bf16_seconds": spread(in_short),
        "wide_seconds": spread(in_wide),
        "wide_over_bf16": spread([b / a for a, b in zip(in_short, in_wide, strict=True)]),
        "loop_over_bf16": spread([b / a for a, b in zip(in_short, looped, strict=True)]),
    }
