"""Peak memory of a meta-iteration of the first-order rules at few and at many inner steps.

Counted are the tensors that live at any one time within it, without what single operations use inside; on a GPU what
its allocator has given out.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from fomal.engine.chunking import peak_bytes
from tests.benchmarks import ours
from tests.benchmarks.measure import attempt
from tests.benchmarks.works import Work

RULES = ("reptile", "fomaml", "query_fomaml")
INNER_STEPS = (5, 50)


def rows(work: Work, given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One for each way to run and rule."""
    for run_as, rule in itertools.product(given.run_as, RULES):
        made = replace(work, run_as=run_as)
        row = {"work": work.name, "rule": "memory", "as": run_as, "outer_rule": rule}
        yield attempt(row, made, "memory", partial(peaks, made, rule))


def peaks(work: Work, rule: str) -> dict[str, Any]:
    """Bytes by the number of inner steps."""
    return {"status": "timed", "peak_bytes": {str(k): peak(replace(work, inner_steps=k), rule) for k in INNER_STEPS}}


def peak(work: Work, rule: str, optimizer: str = "adam") -> int:
    """Bytes beyond those of the tasks, the weights and the trace."""
    run = ours.prepare(work, rule, optimizer)
    run()
    if work.device != "cuda":
        return peak_bytes(run)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return torch.cuda.max_memory_allocated() - before
