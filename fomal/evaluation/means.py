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
    rounding at 1e-15. Where tasks have weights w, the mean is sum w v / sum w, and its variance that of independent
    values of one variance, s^2 sum w^2 / (sum w)^2 with s^2 = sum w (v - mean)^2 / (sum w - sum w^2 / sum w); equal
    weights are as none.

    Args:
        size: figures per task; None for one.
        weighted: take weights.
        kwargs: see `torchmetrics.Metric`.
    """

    full_state_update = False
    total: Tensor
    squares: Tensor
    total_tasks: Tensor
    weight: Tensor
    weight_squares: Tensor

    def __init__(self, size: int | None = None, weighted: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.weighted = weighted
        shape = () if size is None else (size,)
        self.add_state("total", torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("squares", torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("total_tasks", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        for name in ("weight", "weight_squares") if weighted else ():
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, values: Tensor, weights: Tensor | None = None) -> None:
        """Add tasks.

        Args:
            values: (T,), or (T, size).
            weights: (T,), not negative; None: 1 each. A task of weight 0 is none, whatever its values.
        """
        with torch.inference_mode(False):  # sums outlive an evaluation in inference mode, Lightning's default
            values = values.double()
            if weights is None:
                tasks, sums, squares = len(values), values.sum(0), values.square().sum(0)
                each = torch.ones(tasks, dtype=torch.float64, device=values.device)
            else:
                counts, each = weights > 0, weights.double()
                values, each = values[counts], each[counts]
                column = each.view(-1, *[1] * (values.ndim - 1))
                tasks, sums, squares = len(values), (column * values).sum(0), (column * values.square()).sum(0)
            self.total = self.total + sums
            self.squares = self.squares + squares
            self.total_tasks = self.total_tasks + tasks
            if self.weighted:
                self.weight = self.weight + each.sum()
                self.weight_squares = self.weight_squares + each.square().sum()
            elif weights is not None:
                raise ValueError("weights need TaskMean(weighted=True).")

    def reset(self) -> None:
        """Forget all tasks."""
        with torch.inference_mode(False):
            super().reset()

    def compute(self) -> tuple[Tensor, Tensor]:
        """The mean and the half-width 1.96 s / sqrt(T), s with T - 1 degrees of freedom; NaN for fewer than 2 tasks."""
        tasks = self.total_tasks.double()
        weight, squares = (self.weight, self.weight_squares) if self.weighted else (tasks, tasks)
        mean = self.total / weight
        variance = (self.squares - weight * mean.square()).clamp_min(0) / (weight - squares / weight)
        half = 1.96 * (variance / (weight.square() / squares)).sqrt()
        return mean, half.where(self.total_tasks > 1, torch.nan)

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> TaskMean:
        """Move, but keep float64 whatever the precision of the run."""
        super()._apply(fn, *args, **kwargs)
        for name in self._defaults:
            state = getattr(self, name)
            setattr(self, name, state.long() if name == "total_tasks" else state.double())
        return self


def merge_over_processes(metrics: Sequence[TaskMean]) -> None:
    """Give every process the sums over all of them, in one all-reduce; a process may have had no tasks."""
    for metric in metrics:
        metric.update(torch.zeros(0, *metric.total.shape, device=metric.device))  # not "compute before update"
    sums = iter(sum_over_processes([getattr(m, name).double() for m in metrics for name in m._defaults]))
    for metric in metrics:
        for name in metric._defaults:
            setattr(metric, name, next(sums).to(getattr(metric, name).dtype))


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
