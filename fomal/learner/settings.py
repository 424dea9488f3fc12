"""Settings of a learner that belong together, under the same names in Python and in YAML.

They do not change; `learner.outer = dataclasses.replace(learner.outer, final=1.0)` puts others in their place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from lightning.pytorch.cli import OptimizerCallable
from torch import nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

from fomal.utils.checks import MANY, countable, nonnegative, one_of, positive


@dataclass(frozen=True)
class InnerSchedule:
    """The inner steps on a task.

    Args:
        steps: how many, k; 0 judges the initialisation as it is and, in training by rules with a query set, learns it
            without adaptation.
        batch_size: support examples per step.
        replacement: sample each mini-batch independently, rather than in shuffled passes.
        reduction: "mean" or, as the released code has it, "sum" of a mini-batch's losses, which a step descends. Under
            Adam with carried state, a sum makes the steps of evaluations shorter where their mini-batches are smaller
            than those of training.

    Raises:
        ValueError: steps or batch size are no whole numbers, steps negative, batch size less than 1, or absurdly many;
            another reduction.
    """

    steps: int = 5
    batch_size: int = 10
    replacement: bool = False
    reduction: Literal["mean", "sum"] = "mean"

    def __post_init__(self) -> None:
        try:
            one_of(("mean", "sum"), reduction=self.reduction)
            countable(MANY, steps=self.steps)
            positive(MANY, batch_size=self.batch_size)
        except ValueError as error:
            raise ValueError(f"model.train or model.eval: {error}") from None


@dataclass(frozen=True)
class EvalSchedule(InnerSchedule):
    """The inner steps on a validation, test or prediction task, and those after which its metrics are reported.

    Args:
        steps: see `InnerSchedule`; 0 judges the initialisation as it is.
        batch_size: see `InnerSchedule`.
        replacement: see `InnerSchedule`.
        reduction: see `InnerSchedule`.
        report_steps: the steps after which each metric is reported too, 0 for before adaptation, e.g. [0, 1, 5]; after
            the last step it always is. Null: each step in regressions, and none in classifications.

    Raises:
        ValueError: as `InnerSchedule`; a step that is reported is negative, or beyond the last.
    """

    report_steps: list[int] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.report_steps, list | tuple | None):
            raise ValueError(f"model.eval.report_steps={self.report_steps!r} must be a list of steps, or null.")
        for step in self.report_steps or ():
            countable(MANY, **{"model.eval.report_steps": step})
            if step > self.steps:
                raise ValueError(
                    f"model.eval.report_steps={list(self.report_steps or ())} has step {step}, but "
                    f"model.eval.steps={self.steps}: leave it out, or take more steps."
                )


def interpolation(params: Iterable[nn.Parameter]) -> Optimizer:
    """The paper's outer optimiser: it goes the whole way to the mean of the adapted weights."""
    return SGD(params, lr=1.0)


@dataclass(frozen=True)
class OuterStep:
    """The use of an outer gradient, the mean over all tasks of a meta-batch.

    Args:
        optimizer: any torch optimiser; SGD with lr = eps is the paper's interpolation.
        schedule: any torch scheduler, stepped once a meta-iteration; null is the paper's, which goes linearly from the
            outer step size to `final` times it at `trainer.max_steps`, or after `max_epochs` times
            `limit_train_batches`.
        final: share of the outer step size that is left at the end of the linear schedule.
        clip_val: clip the outer gradient before the optimiser, as `trainer.gradient_clip_val` does where there is a
            loss. Null: do not.
        clip_algorithm: by the norm of all parameters together, or each value by itself.
        parameters: whether the outer rule learns all parameters, or those alone that the inner loop adapts; the others
            then stay as they are. Rules made of displacements have nothing to say about the others.
        on_nonfinite: what to do with a task whose loss, gradient or inner state becomes infinite or NaN: raise, naming
            it, or leave it out of the mean and log how many were (`train/skipped_tasks`), at the cost of one wait for
            the device in each meta-iteration; a hundred meta-batches in a row without a task that counts end the run.
            On a GPU `raise` looks every ten meta-iterations and before each save.

    Raises:
        ValueError: a value is out of its range, naming it and the remedy.
    """

    optimizer: OptimizerCallable = interpolation
    schedule: Callable[[Optimizer], LRScheduler] | None = None
    final: float = 0.0
    clip_val: float | None = None
    clip_algorithm: Literal["norm", "value"] = "norm"
    parameters: Literal["all", "adapted"] = "all"
    on_nonfinite: Literal["raise", "skip_task"] = "raise"

    def __post_init__(self) -> None:
        if not callable(self.optimizer):
            raise ValueError(
                f"model.outer.optimizer={self.optimizer!r} must make an optimiser, as torch.optim.SGD does."
            )
        nonnegative(**{"model.outer.final": self.final})
        if self.clip_val is not None and not 0 < self.clip_val < float("inf"):
            raise ValueError(f"model.outer.clip_val={self.clip_val} must be above 0 and finite, or null for none.")
        one_of(("norm", "value"), **{"model.outer.clip_algorithm": self.clip_algorithm})
        one_of(("all", "adapted"), **{"model.outer.parameters": self.parameters})
        one_of(("raise", "skip_task"), **{"model.outer.on_nonfinite": self.on_nonfinite})

    @property
    def skips(self) -> bool:
        """Tell whether tasks that are not finite are left out."""
        return self.on_nonfinite == "skip_task"

    def clip(self, parameters: Iterable[nn.Parameter]) -> None:
        """Clip the gradients of parameters, in place."""
        if self.clip_val is not None:
            by_norm = self.clip_algorithm == "norm"
            clip: Any = nn.utils.clip_grad_norm_ if by_norm else nn.utils.clip_grad_value_
            clip(parameters, self.clip_val)

    def build(self, parameters: Iterable[nn.Parameter], total: int) -> tuple[Optimizer, LRScheduler]:
        """Make the optimiser of parameters, and its schedule.

        Args:
            parameters: to be learnt.
            total: the meta-iterations of the run; -1 where nothing limits them.

        Raises:
            ValueError: the schedule waits for a metric, or would have no end.
        """
        optimizer = self.optimizer(parameters)
        if self.schedule is None:
            if total < 1 and self.final != 1:
                raise ValueError(
                    f"trainer.max_steps={total} leaves the linear outer schedule without an end: set "
                    f"trainer.max_steps, or model.outer.final: 1 for a constant step size."
                )
            return optimizer, LambdaLR(optimizer, partial(_linear, total, self.final))
        schedule = self.schedule(optimizer)
        if not isinstance(schedule, LRScheduler) or isinstance(schedule, ReduceLROnPlateau):
            raise ValueError(
                f"model.outer.schedule={type(schedule).__name__} waits for a metric, but is stepped every "
                f"meta-iteration: use one of the step alone, e.g. torch.optim.lr_scheduler.CosineAnnealingLR."
            )
        return optimizer, schedule


@dataclass(frozen=True)
class Execution:
    """The way a learner is computed, on which its results depend by rounding alone.

    Args:
        vectorize: adapt the tasks of a meta-batch all at once; null tries, and falls back to a loop with a message.
        traced: trace the operations of an inner step, and of an evaluation, once for each shape, and replay them; each
            trace is compared with the plain functions before it is used. What the network's forward does beside torch
            operations must be the same each time; null traces networks made of torch's, torchvision's, timm's and
            fomal's modules.
        compiled: also compile traces with torch.compile, which takes some ten seconds for each and a C++ compiler.
        cuda_graph: capture the device's part of a meta-iteration, up to the outer gradient, as a CUDA graph, and replay
            it; with `data.on_device` the sampling of the tasks is part of it. Other devices, and networks that draw
            random numbers (dropout) or wait for the device, run as they are, with one line that says so.
        tasks_per_chunk: how many tasks each process adapts at once, in training and evaluation; a meta-batch of more
            runs in chunks. Null chooses as many as take at most half of the memory that is free, and fewer where a
            GPU's does not suffice after all.

    Raises:
        ValueError: tasks_per_chunk is no whole number or less than 1.
    """

    vectorize: bool | None = None
    traced: bool | None = None
    compiled: bool = False
    cuda_graph: bool = False
    tasks_per_chunk: int | None = None

    def __post_init__(self) -> None:
        if self.tasks_per_chunk is not None:
            positive(**{"model.execution.tasks_per_chunk": self.tasks_per_chunk})


def _linear(total: int, final: float, step: int) -> float:
    """The share of the outer step size after `step` of `total` meta-iterations."""
    return 1 + (final - 1) * min(step / max(total, 1), 1)


TRAIN, EVAL, OUTER, EXECUTION = InnerSchedule(), EvalSchedule(steps=50, batch_size=5), OuterStep(), Execution()
"""The defaults."""

GROUPS: dict[str, Any] = {"train": TRAIN, "eval": EVAL, "outer": OUTER, "execution": EXECUTION}
"""The arguments that are settings which belong together, with their defaults."""
