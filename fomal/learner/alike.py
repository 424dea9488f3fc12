"""The likeness of learners that are trained side by side as replicas."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from fomal.inner.optimizer import InnerOptimizer
from fomal.learner.meta_learner import MetaLearner
from fomal.utils.fingerprint import settings

SAME = ("train_schedule", "eval_schedule", "inner_state")


def check_alike(learners: Sequence[MetaLearner]) -> None:
    """Raise ValueError, naming what differs or is not known, for learners that `Replicas` cannot train together."""
    if len(learners) < 2:
        raise ValueError(f"replicas are two or more, but learners has {len(learners)} entries.")
    if len({id(p) for learner in learners for p in learner.network.parameters()}) < sum(
        len(list(learner.network.parameters())) for learner in learners
    ):
        raise ValueError("two replicas share parameters: give each learner a network of its own.")
    for learner in learners:
        _check_alone(learner)
    first = learners[0]
    for place, other in enumerate(learners[1:], 1):
        wrong = [name for name in SAME if getattr(first, name) != getattr(other, name)]
        wrong += [] if settings(first.rule) == settings(other.rule) else ["rule"]
        wrong += [] if first.objective.losses_used() == other.objective.losses_used() else ["loss"]
        wrong += [] if _metrics(first) == _metrics(other) else ["list of metrics"]
        wrong += [] if _but_lr(first) == _but_lr(other) else ["inner_optimizer"]
        wrong += [] if _architecture(first.network) == _architecture(other.network) else ["network"]
        wrong += [] if _same_buffers(first.network, other.network) else ["network's buffers"]
        if wrong:
            raise ValueError(
                f"replica {place} has another {wrong[0]} than replica 0: seeds and step sizes alone may differ."
            )


def _check_alone(learner: MetaLearner) -> None:
    """Refuse what a learner has that replicas do not know."""
    for name, given in {
        "adapt": learner.adapted is not None,
        "inner_state=in_series": learner.inner_state == "in_series",
        "execution.cuda_graph": learner.execution.cuda_graph,
    }.items():
        if given:
            raise ValueError(f"model.{name} does not work with replicas yet: leave one of the two out.")
    if learner.outer.skips:
        raise ValueError("model.outer.on_nonfinite=skip_task does not work with replicas: leave one of the two out.")
    optimizer = type(learner.inner_optimizer)
    if optimizer.for_tasks is not InnerOptimizer.for_tasks:
        raise ValueError(
            f"{optimizer.__name__} samples noise by episode, which replicas do not know: use another optimiser, or "
            f"run them one by one."
        )
    frozen = [name for name, p in learner.network.named_parameters() if not p.requires_grad]
    if frozen:
        raise ValueError(f"replicas learn all parameters, but {frozen[0]} is frozen: run them one by one.")


def _metrics(learner: MetaLearner) -> Any:
    return [(metric.name, metric.unit, metric.higher_is_better) for metric in learner.metrics or ()]


def _but_lr(learner: MetaLearner) -> Any:
    return [part for part in settings(learner.inner_optimizer) if not isinstance(part, tuple) or part[0] != "lr"]


def _architecture(network: nn.Module) -> Any:
    """What can be seen of what a network computes: its modules with their settings, and the shapes of parameters."""
    modules = {
        name: (type(module), [part for part in vars(module).items() if isinstance(part[1], int | float | str | tuple)])
        for name, module in network.named_modules()
    }
    return modules, {name: p.shape for name, p in network.named_parameters()}


def _same_buffers(a: nn.Module, b: nn.Module) -> bool:
    mine, theirs = dict(a.named_buffers()), dict(b.named_buffers())
    return mine.keys() == theirs.keys() and all(torch.equal(t, theirs[name]) for name, t in mine.items())
