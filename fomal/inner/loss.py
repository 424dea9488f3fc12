"""The loss of one task: from a network at the task's parameters and labelled examples to a number for each example."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fomal.utils.checks import first_line, numbers
from fomal.utils.pytree import Data, described, leaves, map_leaves

Forward = Callable[[Data], Data]
"""The network at one task's parameters: inputs (B, *input) to outputs (B, ...)."""


class Loss(ABC):
    """A task's loss as a function of the network, which a loss may run on any inputs, and any number of times.

    Inputs, targets and outputs are tensors, or nested dicts of tensors where the data or the network have these; each
    tensor is (B, ...), and below stands for such dicts too.

    A loss is a value: `__call__` draws no random numbers and changes nothing, so that it may be vectorised over tasks,
    traced and differentiated twice. Settings are attributes; what is computed with one is never used with another.
    """

    @abstractmethod
    def __call__(self, forward: Forward, x: Data, y: Data) -> Tensor:
        """The loss of each example; their mean is taken elsewhere (`mean_over_examples`).

        Args:
            forward: the network, whose outputs come in 32 bits at least.
            x: (B, *input), in the data's dtype.
            y: (B, *target), int64 labels, or floating-point targets in 32 bits at least.

        Returns:
            (B,), floating point.
        """

    def weights(self, y: Data) -> Tensor | None:
        """The weight of each example in the mean over examples, (B,), not negative; None: all the same."""
        return None

    def predict(self, forward: Forward, x: Data) -> Data:
        """Predict for inputs (B, *input), (B, *prediction): the network's outputs, unless a loss differs."""
        return forward(x)

    def metrics(self, y: Data) -> tuple[str, ...]:
        """The names of the metrics of `fomal.evaluation` that targets `y` are judged by unless `model.metrics` says.

        Returns:
            With "accuracy" among them, predictions are scores of classes, the last axis, and are made under both
            protocols; otherwise they are a regression's. As it is, ("accuracy",) for labels and ("loss",) for targets.
        """
        return ("accuracy",) if isinstance(y, Tensor) and not y.is_floating_point() else ("loss",)

    def outputs(self, size: int) -> int:
        """The number of outputs of the network, where the data have `size` classes or targets: as many, as it is."""
        return size

    def check(self, forward: Forward, x: Data, y: Data, ways: int) -> None:  # noqa: B027 # it may refuse nothing
        """Refuse a network or data that the loss does not fit, on a mini-batch of one task; as it is, nothing.

        Args:
            forward: the network.
            x: (B, *input).
            y: (B, *target).
            ways: number of classes; 1 for targets.

        Raises:
            ValueError: naming what does not fit, its value and the remedy.
        """


def mean_over_examples(losses: Tensor, weights: Tensor | None) -> Tensor:
    """The mean of losses (B,), weighted by `weights` (B,); 0 where no example counts. The only place where it is taken.

    Examples of weight 0 are left out: their losses must be finite all the same.
    """
    if weights is None:
        return losses.mean()
    weights = weights.to(losses.dtype)
    return (losses * weights).sum() / weights.sum().clamp_min(torch.finfo(losses.dtype).tiny)


def sum_over_examples(losses: Tensor, weights: Tensor | None) -> Tensor:
    """The sum of losses (B,), each times its weight (B,)."""
    return losses.sum() if weights is None else (losses * weights.to(losses.dtype)).sum()


def at_least_32_bits(value: Data) -> Data:
    """The same tensors, with 16-bit floating-point numbers as 32-bit ones."""

    def widened(t: Tensor) -> Tensor:
        return t.to(torch.promote_types(t.dtype, torch.float32)) if t.is_floating_point() else t

    return map_leaves(widened, value)


def predicts_classes(loss: Loss, y: Data) -> bool:
    """Tell whether the predictions of targets `y` are scores of classes, see `Loss.metrics`."""
    return "accuracy" in loss.metrics(y)


def losses_and_weights(loss: Loss, forward: Forward, x: Data, y: Data) -> tuple[Tensor, Tensor | None]:
    """The losses (B,) and weights (B,), if there are any, of one task's examples x (B, *input) and y (B, *target)."""
    y = at_least_32_bits(y)
    return loss(lambda x: at_least_32_bits(forward(x)), x, y), loss.weights(y)


def refuse_torchs(**losses: Any) -> None:
    """Raise ValueError, naming the argument, for a loss that is neither a `Loss` nor None."""
    for name, loss in losses.items():
        if not isinstance(loss, Loss | None):
            given = type(loss).__name__
            raise ValueError(
                f"{name}={given} is no fomal.inner.Loss: give one of fomal.inner, such as CrossEntropy(), or "
                f"Elementwise(...) around a loss of torch's, or a subclass of your own."
            )


def check_loss(loss: Loss, forward: Forward, x: Data, y: Data, ways: int) -> None:
    """Try a loss on a mini-batch of one task; see `Loss.check`, whose arguments these are.

    Raises:
        ValueError: the loss does not fit network and data, or does not give one number for each example.
    """
    y, name, examples = at_least_32_bits(y), type(loss).__name__, len(leaves(x)[0])
    try:
        loss.check(forward, x, y, ways)
        losses, weights = loss(lambda x: at_least_32_bits(forward(x)), x, y), loss.weights(y)
    except (torch.OutOfMemoryError, ValueError):
        raise
    except Exception as error:  # of users' losses: many kinds
        raise ValueError(
            f"model.loss {name} fails on inputs {described(x)} and targets {described(y)} ({first_line(error)}): "
            f"change the loss, the network's outputs or the data."
        ) from error
    for found, what in ((losses, "returns"), (weights, "has weights")):
        if found is None and what == "has weights":
            continue
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        if shape != (examples,):
            raise ValueError(
                f"model.loss {name} {what} {shape} for a mini-batch of {examples} examples: give ({examples},), one "
                f"number for each, without the mean over them."
            )
    if not losses.is_floating_point():
        raise ValueError(f"model.loss {name} returns {losses.dtype}: give floating-point numbers.")


def one_tensor(loss: Loss, forward: Forward, x: Data) -> Tensor:
    """The network's output; ValueError where it is several tensors, of which a loss takes one."""
    output = forward(x)
    if not isinstance(output, Tensor):
        raise ValueError(
            f"model.network returns a {type(output).__name__} rather than one tensor, {described(output)}, of which "
            f"{type(loss).__name__} knows nothing: let its forward return the one alone, or give model.loss a "
            f"fomal.inner.Loss of your own."
        )
    return output


def refuse_several(loss: Loss, y: Data) -> None:
    """Raise ValueError where targets are several tensors, of which a loss takes one."""
    if not isinstance(y, Tensor):
        raise ValueError(
            f"the data's targets are {described(y, 1)} per example, but {type(loss).__name__} takes one tensor: give "
            f"model.loss a fomal.inner.Loss of your own, or give one tensor."
        )


def constant(values: Any, like: Tensor) -> Tensor:
    """Numbers of a setting as a tensor, on the device and in the dtype of another."""
    return torch.tensor(values, dtype=like.dtype, device=like.device)


def refuse_unless_positive(name: str, values: Sequence[float]) -> list[float]:
    """The values of a setting as a list; ValueError, naming it, unless all are finite and above 0."""
    numbers(**{name: values})
    if not values or min(values) <= 0:
        raise ValueError(f"{name}={list(values)} must be above 0, one number at least.")
    return list(values)


def kinds(**losses: Loss | None) -> dict[str, str | None]:
    """The class path of each loss, as a checkpoint keeps it of a learner that no configuration makes."""
    return {
        name: None if loss is None else f"{type(loss).__module__}.{type(loss).__qualname__}"
        for name, loss in losses.items()
    }


def refuse_missing(kept: Mapping[str, Any], given: Mapping[str, Any], path: str | Path) -> None:
    """Raise ValueError where a checkpoint's learner has a loss of its own, see `kinds`, that is not given again."""
    for name in ("loss", "query_loss"):
        if kept.get(name) is not None and name not in given:
            raise ValueError(f"{path} is of a learner with {name}={kept[name]}: give load_from_checkpoint {name}= too.")
