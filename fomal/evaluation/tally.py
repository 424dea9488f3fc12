"""Means over the tasks of an evaluation, with their intervals: what is logged and written down."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fomal.evaluation.figures import DISTANCE, Quantity, reported
from fomal.evaluation.means import TaskMean, merge_over_processes
from fomal.evaluation.metrics import Metric
from fomal.evaluation.protocols import ClassificationResult, Result
from fomal.utils.checks import some
from fomal.utils.output import rank_zero_warn
from fomal.utils.processes import gather
from fomal.utils.pytree import leaves


@dataclass(frozen=True)
class _Layout:
    """The metrics, protocols and steps: the same in all processes, of which one may have had no tasks.

    Attributes:
        metrics: name, unit and direction of each.
        both: whether under both protocols.
        steps: the inner steps that are reported; empty for the last alone.
    """

    metrics: tuple[Quantity, ...]
    both: bool
    steps: tuple[int, ...]

    @property
    def size(self) -> int:
        """Figures of a metric."""
        return (1 + self.both) * max(1, len(self.steps))


class Tally:
    """The results of an evaluation's tasks so far.

    Args:
        device: where they are.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._layout: _Layout | None = None
        self._means: dict[str, TaskMean] = {}
        self._judged: list[tuple[Tensor, Tensor, Tensor]] = []  # numbers, finite predictions, finite in all

    def add(self, number: Tensor, result: Result, metrics: Sequence[Metric], weights: Tensor | None = None) -> None:
        """Add T tasks.

        Args:
            number: (T,), their numbers.
            result: what was found.
            metrics: what was measured.
            weights: (T,), how much each counts in all means; None: all the same.
        """
        both = isinstance(result, ClassificationResult)
        kinds = tuple(Quantity(metric.name, metric.name, metric.unit, metric.higher_is_better) for metric in metrics)
        self._begin(_Layout(kinds, both, result.steps))
        for name, values in result.figures.items():
            self._means[name].update(values.flatten(1), weights)
        self._means["distance"].update(result.distance, weights)
        self._judged.append((number, _finite(leaves(result._replace(figures={}))), _finite(leaves(result))))

    def _begin(self, layout: _Layout) -> None:
        if self._layout is None:
            sizes = {figure.name: layout.size for figure in layout.metrics} | {"distance": None}
            means = {name: TaskMean(size, weighted=True, sync_on_compute=False) for name, size in sizes.items()}
            self._means = {name: mean.to(self.device) for name, mean in means.items()}
        self._layout = layout

    def finish(self, stage: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The means over the tasks of all processes.

        Args:
            stage: what the names begin with, "val" or "test".

        Returns:
            What is logged, with half-widths of the 95 % intervals as `..._ci95`; and all that is written down.
        """
        layout = next((found for found in gather(self._layout) if found is not None), None)
        if layout is None:
            return {}, {"tasks": 0, "metrics": {}, "figures": {}}
        self._begin(layout)
        merge_over_processes(list(self._means.values()))
        figures = self._figures(layout)
        logged = {f"{stage}/{figure.name}": mean for figure, mean, _ in figures}
        logged |= {f"{stage}/{figure.name}_ci95": half for figure, _, half in figures}
        results = self._by_step(layout) if layout.steps else {}
        if not all(mean.isfinite() for _, mean, _ in figures):
            results["nonfinite_tasks"] = self._name_nonfinite(stage, layout)
        results |= {
            "tasks": int(self._means["distance"].total_tasks),
            "metrics": {name: value.item() for name, value in logged.items()},
            "figures": {f"{stage}/{figure.name}": figure.about() for figure, _, _ in figures},
        }
        return logged, results

    def _each(self, layout: _Layout, name: str) -> list[tuple[Tensor, Tensor]]:
        """The means (P,) and half-widths (P,) of a metric, under each protocol."""
        shape = 1 + layout.both, max(1, len(layout.steps))
        means, halves = (t.reshape(shape) for t in self._means[name].compute())
        return list(zip(means, halves, strict=True))

    def _figures(self, layout: _Layout) -> list[tuple[Quantity, Tensor, Tensor]]:
        """Each figure with its mean and half-width, ()."""
        before = 0 in layout.steps
        values: list[tuple[Tensor, Tensor]] = []
        for metric in layout.metrics:
            for mean, half in self._each(layout, metric.name):
                values += [(mean[place], half[place]) for place in ((0, -1) if before else (-1,))]
        figures = [*reported(layout.metrics, layout.both, before), DISTANCE]
        values.append(self._means["distance"].compute())
        return [(figure, *value) for figure, value in zip(figures, values, strict=True)]

    def _by_step(self, layout: _Layout) -> dict[str, Any]:
        """The means of each figure at the steps that are reported."""
        found: dict[str, Any] = {}
        for metric in layout.metrics:
            names = [f"{metric.name}_by_step", f"{metric.name}_transductive_by_step"]
            for name, (mean, half) in zip(names, self._each(layout, metric.name), strict=False):
                found |= {name: mean.tolist(), f"{name}_ci95": half.tolist()}
        return found | {"reported_steps": list(layout.steps)}

    def _name_nonfinite(self, stage: str, layout: _Layout) -> list[int]:
        """Say which tasks make the means infinite or NaN; their numbers."""
        diverged = _gathered([number[~predicted] for number, predicted, _ in self._judged])
        bad = _gathered([number[~measured] for number, _, measured in self._judged])
        names = ", ".join(figure.name for figure in layout.metrics)
        remedy = "lower model.inner_optimizer.lr or model.eval.steps"
        if bad and not diverged:
            remedy = "the predictions themselves are, so see what the metric makes of them"
        rank_zero_warn(
            f"{stage}: the predictions, {names} or distance of task {some(bad)} are not finite, nor are the means: "
            f"{remedy}."
        )
        return bad


def _gathered(numbers: Sequence[Tensor]) -> list[int]:
    """The numbers of tasks of all processes, in order."""
    return sorted(number for part in gather([n for own in numbers for n in own.tolist()]) for number in part)


def _finite(parts: Sequence[Tensor]) -> Tensor:
    """Of which tasks all values are finite, (T,)."""
    return torch.stack([part.isfinite().reshape(len(part), -1).all(1) for part in parts if part.numel()]).all(0)
