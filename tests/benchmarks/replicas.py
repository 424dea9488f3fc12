"""R replicas in one program beside one run alone: meta-iterations of Reptile through the Trainer, tasks drawn in both.

Both are timed within their training, after the first meta-iterations. R runs one after the other take R times as long
as one.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from copy import copy
from dataclasses import replace
from functools import partial
from typing import Any

import lightning as L
from torch import Tensor

from fomal.learner.meta_learner import MetaLearner
from fomal.learner.replicas import Replicas
from fomal.tasks.datamodule import EpisodeDataModule
from fomal.tasks.replicated import ReplicatedDataModule
from tests.benchmarks import ours
from tests.benchmarks.measure import CHECKED_ITERATIONS, PRECISIONS, attempt, difference, in_turn, spread, tolerance
from tests.benchmarks.trainer import seconds
from tests.benchmarks.works import Work


def rows(work: Work, given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One for each way to run."""
    for run_as in given.run_as:
        made = replace(work, run_as=run_as)
        row = {"work": work.name, "rule": "replicas", "as": run_as, "replicas": given.replicas}
        yield attempt(row, made, "replicas", partial(ratios, made, given.replicas, given.rounds))


def ratios(work: Work, count: int, rounds: int) -> dict[str, Any]:
    """Check that each replica is the run that it would be alone, then time all and the first one in turn."""
    apart = {}
    for dtype in PRECISIONS:
        typed = replace(work, dtype=dtype)
        learners = [typed.learner("fit", "adam", seed) for seed in range(count)]
        joint = partial(trained, Replicas(learners), ReplicatedDataModule(typed.data, range(count)), typed)
        runs = alone(typed, count)
        expected = {
            f"learners.{seed}.{name}": t
            for seed, run in enumerate(runs)
            for name, t in run(CHECKED_ITERATIONS, ours.Stamps(typed)).items()
        }
        found = difference(joint(CHECKED_ITERATIONS, ours.Stamps(typed)), expected)
        apart[str(dtype).removeprefix("torch.")] = found
        if not found <= tolerance(dtype):
            return {"difference": apart, "status": "differs", "reason": "the replicas are not the runs: not timed"}
    together, one = in_turn([partial(seconds, run, typed) for run in (joint, runs[0])], rounds)
    return {
        "difference": apart,
        "status": "timed",
        "joint_seconds": spread(together),
        "one_seconds": spread(one),
        "joint_over_one": spread([a / b for a, b in zip(together, one, strict=True)]),
        "all_over_joint": spread([count * b / a for a, b in zip(together, one, strict=True)]),
    }


def alone(work: Work, count: int) -> list[Any]:
    """Each replica as a run of its own; what is traced for one holds for all."""
    found, first = [], None
    for seed in range(count):
        learner, data = work.learner("fit", "adam", seed), copy(work.data)
        data.seed = seed
        first = first or learner
        learner.objective = first.objective
        found.append(partial(trained, learner, data, work))
    return found


def trained(
    module: L.LightningModule, data: EpisodeDataModule, work: Work, steps: int, stamps: ours.Stamps
) -> dict[str, Tensor]:
    """Train on; how far the weights have moved."""
    module.to(work.device)
    start = ours.weights(module)
    ours.train(module, data, work, steps, stamps)
    learner = module if isinstance(module, MetaLearner) else next(iter(module))
    ours.confirm(learner, work.run_as)
    return ours.moved(start, module, work.device)
