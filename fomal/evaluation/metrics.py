"""The mean over tasks and its 95 % confidence interval."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from fomal.utils.processes import sum_over_processes


class TaskMean(Metric):
    """Mean over tasks of one or several figures per task, with the normal 95 % confidence half-width.

    Sums are kept in float64 and added over processes, so neither batching nor sharding changes the result beyond
    rounding at 1e-15.

    Args:
        size: figures per task; None for one.
        kwargs: see `torchmetrics.Metric`.
    """

    full_state_update = False
    total: Tensor
    squares: Tensor
    total_tasks: Tensor

    def __init__(self, size: int | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        shape = () if size is None else (size,)
        self.add_state("total", torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("squares", torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("total_tasks", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, values: Tensor) -> None:
        """Add tasks: (T,), or (T, size)."""
        with torch.inference_mode(False):  # sums outlive an evaluation in inference mode, Lightning's default
            values = values.double()
            self.total = self.total + values.sum(0)
            self.squares = self.squares + values.square().sum(0)
            self.total_tasks = self.total_tasks + len(values)

    def reset(self) -> None:
        """Forget all tasks."""
        with torch.inference_mode(False):
            super().reset()

    def compute(self) -> tuple[Tensor, Tensor]:
        """The mean and the half-width 1.96 s / sqrt(T), s with T - 1 degrees of freedom; NaN for fewer than 2 tasks."""
        mean = self.total / self.total_tasks
        variance = (self.squares - self.total_tasks * mean.square()).clamp_min(0) / (self.total_tasks - 1)
        return mean, 1.96 * (variance / self.total_tasks).sqrt()

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> TaskMean:
        """Move, but keep float64 whatever the precision of the run."""
        super()._apply(fn, *args, **kwargs)
        self.total, self.squares = self.total.double(), self.squares.double()
        self.total_tasks = self.total_tasks.long()
        return self


def merge_over_processes(metrics: Sequence[TaskMean]) -> None:
    """Give every process the sums over all of them, in one all-reduce; a process may have had no tasks."""
    for metric in metrics:
        metric.update(torch.zeros(0, *metric.total.shape, device=metric.device))  # not "compute before update"
    parts = [t.double() for m in metrics for t in (m.total, m.squares, m.total_tasks)]
    sums = iter(sum_over_processes(parts))
    for metric in metrics:
        metric.total, metric.squares, metric.total_tasks = next(sums), next(sums), next(sums).long()


_STUDENT = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281)
_NORMAL = 1.959964


def student_interval(values: Sequence[float]) -> tuple[float, float]:
    """The mean of a few independent values and the half-width of its 95 % interval (Student 1908); NaN for one."""
    mean, degrees = statistics.fmean(values), len(values) - 1
    if not degrees:
        return mean, math.nan
    if degrees <= len(_STUDENT):
        quantile = _STUDENT[degrees - 1]
    else:  # Abramowitz & Stegun 26.7.5
        z = _NORMAL
        quantile = z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)
        quantile += (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * degrees**3)
    return mean, quantile * statistics.stdev(values) / math.sqrt(len(values))
