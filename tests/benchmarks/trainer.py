"""The Trainer's share: a training with Reptile through it, and the same meta-iterations as a bare loop.

The bare loop is of the learner's own functions: the sampling of the tasks, the outer gradient, the outer optimiser and
its schedule. What it leaves out is the Trainer, its loader and what the learner does for a run: looking for values that
are not finite, seeding, means for the log. Both are timed within, after the first meta-iterations.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from fomal.engine.cuda_graph import CAPTURES
from fomal.tasks.episode import Episode
from tests.benchmarks import ours
from tests.benchmarks.measure import CHECKED_ITERATIONS, PRECISIONS, attempt, difference, in_turn, spread, tolerance
from tests.benchmarks.works import Work


class Training:
    """One learner, which is trained again and again from the same weights."""

    def __init__(self, work: Work) -> None:
        self.work, self.learner = work, work.learner("fit", "adam")
        self.start = ours.weights(self.learner.network)

    def through_trainer(self, steps: int, stamps: ours.Stamps) -> dict[str, Tensor]:
        """A `fit`."""
        self._begin()
        ours.train(self.learner, self.work.data, self.work, steps, stamps)
        return self._end()

    def bare(self, steps: int, stamps: ours.Stamps) -> dict[str, Tensor]:
        """The same without a Trainer."""
        self._begin()
        learner, data, device = self.learner, self.work.data, self.work.device
        gradient = learner.gradient_of
        if learner.execution.cuda_graph:
            drawn = learner.capturing(lambda batch, *of: learner.gradient_of(data.sample(batch), *of), CAPTURES[device])
            gradient = learner.captured = drawn
        optimizer = learner.outer.optimizer(learner.network.parameters())
        schedule = LambdaLR(optimizer, lambda step: 1 - step / steps)
        for number in range(steps):
            tasks = torch.arange(number * data.meta_batch_size, (number + 1) * data.meta_batch_size)
            batch = data.batch("train", tasks)
            if isinstance(batch, Episode):
                batch = data.preprocessed(batch.to(device))
            else:
                batch = batch._replace(number=batch.number.to(device))
            learner.adopt(gradient(batch, learner.initialisation(), learner.begun_state()))
            optimizer.step()
            schedule.step()
            stamps.note(number + 1)
        return self._end()

    def _begin(self) -> None:
        self.learner.to(self.work.device)
        self.learner.network.load_state_dict(self.start, strict=False)

    def _end(self) -> dict[str, Tensor]:
        ours.confirm(self.learner, self.work.run_as)
        return ours.moved(self.start, self.learner.network, self.work.device)


def rows(work: Work, given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One for each way to run."""
    for run_as in given.run_as:
        made = replace(work, run_as=run_as)
        row = {"work": work.name, "rule": "trainer", "as": run_as}
        yield attempt(row, made, "trainer", partial(share, made, given.rounds))


def share(work: Work, rounds: int) -> dict[str, Any]:
    """Check that both train alike, then time them in turn."""
    apart = {}
    for dtype in PRECISIONS:
        training = Training(replace(work, dtype=dtype))
        pair = training.through_trainer, training.bare
        found = difference(*(run(CHECKED_ITERATIONS, ours.Stamps(work)) for run in pair))
        apart[str(dtype).removeprefix("torch.")] = found
        if not found <= tolerance(dtype):
            return {"difference": apart, "status": "differs", "reason": "the trainings are not the same: not timed"}
    fitted, bare = in_turn([partial(seconds, run, work) for run in pair], rounds)
    return {
        "difference": apart,
        "status": "timed",
        "fit_seconds": spread(fitted),
        "bare_seconds": spread(bare),
        "share": spread([a / b - 1 for a, b in zip(fitted, bare, strict=True)]),
    }


def seconds(run: Callable[[int, ours.Stamps], object], work: Work) -> float:
    """Of a meta-iteration within a training."""
    stamps = ours.Stamps(work)
    run(stamps.end, stamps)
    return stamps.seconds()
