"""Losses of floating-point targets; each `__call__` is as `Loss` says, (B, ...) to (B,)."""

from __future__ import annotations

import math
from copy import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fomal.inner.loss import Forward, Loss, constant, one_tensor, refuse_several, refuse_unless_positive
from fomal.inner.loss_of_labels import CrossEntropy
from fomal.utils.pytree import Data, described


class _Targets(Loss):
    """A loss between outputs and floating-point targets, which have one shape; the mean over an example's outputs."""

    def __call__(self, forward: Forward, x: Data, y: Tensor) -> Tensor:
        """See `Loss`."""
        output = forward(x)  # (B, *target)
        return _mean(self._between(output, y.to(output.dtype)))

    def _between(self, output: Tensor, y: Tensor) -> Tensor:
        """The loss of each output, shaped as both."""
        raise NotImplementedError

    def check(self, forward: Forward, x: Data, y: Tensor, ways: int) -> None:
        """See `Loss`."""
        _refuse_labels(self, y)
        if (found := tuple(one_tensor(self, forward, x).shape)) != y.shape:
            raise ValueError(
                f"model.network returns {found[1:]} per example, but the data's targets are {tuple(y.shape[1:])}: give "
                f"the network as many outputs."
            )


class SquaredError(_Targets):
    """Squared error (z - y)^2, z = forward(x) (B, *target), the mean over an example's outputs.

    The negative log-likelihood of a normal distribution of fixed variance up to scale and constant (Bishop 2006,
    equation 1.62). Targets y are floating point.

    Raises:
        ValueError: at first use, for labels, and outputs of another shape than the targets.
    """

    def _between(self, output: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(output, y, reduction="none")


class Huber(_Targets):
    """Huber's loss of e = z - y, z = forward(x) (B, *target): e^2 / 2 where |e| <= d, otherwise d (|e| - d / 2).

    The mean over an example's outputs; Huber 1964, "Robust estimation of a location parameter" (Annals of Mathematical
    Statistics 35, 73-101). Targets y are floating point.

    Args:
        delta: d > 0, in the targets' unit.

    Raises:
        ValueError: for another `delta`; at first use, for labels, and outputs of another shape than the targets.
    """

    def __init__(self, delta: float = 1.0) -> None:
        refuse_unless_positive("delta", [delta])
        self.delta = delta

    def _between(self, output: Tensor, y: Tensor) -> Tensor:
        return F.huber_loss(output, y, reduction="none", delta=self.delta)


class BinaryCrossEntropy(_Targets):
    """Cross-entropy of several labels that are each there or not, -(p y log s(z) + (1 - y) log(1 - s(z))), s sigmoid.

    z = forward(x) (B, *labels) are logits; y likewise, floating point, 1 where a label is there and 0 where it is not,
    or probabilities. The mean over an example's labels. Bishop 2006, equation 4.90, p as in torch's
    `BCEWithLogitsLoss`.

    Args:
        pos_weight: p > 0, how much a label that is there counts; one for all labels, or one for each entry of the last
            axis.

    Raises:
        ValueError: for another `pos_weight`; at first use, for int64 labels, targets outside [0, 1], and outputs of
            another shape than the targets.
    """

    def __init__(self, pos_weight: float | list[float] | None = None) -> None:
        if pos_weight is not None:
            refuse_unless_positive("pos_weight", pos_weight if isinstance(pos_weight, list) else [pos_weight])
        self.pos_weight = pos_weight

    def _between(self, output: Tensor, y: Tensor) -> Tensor:
        weight = None if self.pos_weight is None else constant(self.pos_weight, output)
        return F.binary_cross_entropy_with_logits(output, y, pos_weight=weight, reduction="none")

    def check(self, forward: Forward, x: Data, y: Tensor, ways: int) -> None:
        """See `Loss`."""
        super().check(forward, x, y, ways)
        if wrong := y[(y < 0) | (y > 1)].tolist():
            raise ValueError(f"BinaryCrossEntropy needs targets from 0 to 1, but the data have {wrong[0]:g}.")
        several = self.pos_weight if isinstance(self.pos_weight, list) else []
        if several and (y.ndim == 1 or len(several) != y.shape[-1]):
            raise ValueError(
                f"pos_weight of BinaryCrossEntropy has {len(several)} entries, but the data's targets are "
                f"{tuple(y.shape[1:])} per example: give one for each."
            )


class Elementwise(_Targets):
    """Any loss of torch that compares each output with its target, such as `torch.nn.L1Loss`; the mean over outputs.

    Outputs (B, *target) and targets y are floating point.

    Args:
        loss: a module of torch's with a setting `reduction`, which is set to none, and without tensors of its own.

    Raises:
        ValueError: for another kind of `loss`; at first use, for labels, outputs of another shape than the targets, and
            a loss that does not give a number for each.
    """

    def __init__(self, loss: nn.Module) -> None:
        name = type(loss).__name__
        if not isinstance(loss, nn.Module) or not hasattr(loss, "reduction"):
            raise ValueError(f"loss={name} of Elementwise has no reduction: give a loss of torch's, or write a Loss.")
        if loss.state_dict():
            raise ValueError(
                f"loss={name} of Elementwise has tensors, {', '.join(loss.state_dict())}: leave them out, or write a "
                f"fomal.inner.Loss."
            )
        self.loss = copy(loss)
        vars(self.loss)["reduction"] = "none"

    def _between(self, output: Tensor, y: Tensor) -> Tensor:
        found: Tensor = self.loss(output, y)
        return found

    def check(self, forward: Forward, x: Data, y: Tensor, ways: int) -> None:
        """See `Loss`."""
        super().check(forward, x, y, ways)
        if (found := self.loss(forward(x), y)).shape != y.shape:
            raise ValueError(
                f"loss={type(self.loss).__name__} of Elementwise gives {tuple(found.shape)} for targets "
                f"{tuple(y.shape)}: use one with a number for each, e.g. torch.nn.L1Loss."
            )


class _Several(Loss):
    """A loss with n outputs for each target: outputs (B, ..., n D) of targets (B, ..., D), one after the other.

    Targets (B,) are as (B, 1).
    """

    each: int

    def __call__(self, forward: Forward, x: Data, y: Tensor) -> Tensor:
        """See `Loss`."""
        output, y = forward(x).reshape(*_columns(y)[:-1], self.each, -1), y.reshape(_columns(y))
        return _mean(self._between(output, y.to(output.dtype)))

    def _between(self, output: Tensor, y: Tensor) -> Tensor:
        """The loss of outputs (B, ..., n, D) and targets (B, ..., D)."""
        raise NotImplementedError

    def outputs(self, size: int) -> int:
        """See `Loss`: so many for each target."""
        return self.each * size

    def check(self, forward: Forward, x: Data, y: Tensor, ways: int) -> None:
        """See `Loss`."""
        _refuse_labels(self, y)
        *before, size = _columns(y)
        found, wanted = tuple(one_tensor(self, forward, x).shape), (*before, self.each * size)
        if found != wanted and (found, wanted) != ((len(y),), (len(y), 1)):
            raise ValueError(
                f"model.network returns {found[1:]} per example, but the data's targets are {tuple(y.shape[1:])}, and "
                f"{type(self).__name__} has {self.each} outputs for each: give the network outputs {wanted[1:]}."
            )


class Quantile(_Several):
    """The pinball loss max(q e, (q - 1) e) of e = y - z, whose least mean is at the q-quantile of y.

    Koenker & Bassett 1978, "Regression quantiles" (Econometrica 46, 33-50). Outputs are forward(x) (B, ..., n D) for
    floating-point targets y (B, ..., D) and n quantiles, those of all targets for the first q, then those for the next.
    The mean over quantiles and targets.

    Args:
        q: 0 < q < 1, or several.

    Raises:
        ValueError: for another `q`; at first use, for labels, and outputs of another shape.
    """

    def __init__(self, q: float | list[float] = 0.5) -> None:
        self.q = refuse_unless_positive("q", q if isinstance(q, list) else [q])
        if max(self.q) >= 1:
            raise ValueError(f"q={q} must be between 0 and 1.")
        self.each = len(self.q)

    def _between(self, output: Tensor, y: Tensor) -> Tensor:
        q, error = constant(self.q, output)[:, None], y.unsqueeze(-2) - output  # (n, 1), (B, ..., n, D)
        return torch.maximum(q * error, (q - 1) * error)


class GaussianLikelihood(_Several):
    """Negative log-likelihood of a normal distribution, (s + (y - m)^2 exp(-s) + log(2 pi)) / 2, in nats.

    The network gives the mean m and the log variance s = log sigma^2 of each target: forward(x) (B, ..., 2 D) for
    floating-point targets y (B, ..., D), all means and then all log variances. The mean over targets. Nix & Weigend
    1994, "Estimating the mean and variance of the target probability distribution" (ICNN), with the log variance as
    Kendall & Gal 2017 (arXiv:1703.04977) have it.

    Raises:
        ValueError: at first use, for labels, and outputs of another shape.
    """

    each = 2

    def _between(self, output: Tensor, y: Tensor) -> Tensor:
        mean, log_variance = output.unbind(-2)
        return 0.5 * (log_variance + (y - mean).square() * torch.exp(-log_variance) + math.log(2 * math.pi))


_CROSS_ENTROPY, _SQUARED_ERROR = CrossEntropy(), SquaredError()


def loss_for(y: Data) -> Loss:
    """The loss for targets where none is given: cross-entropy for int64 labels, squared error for real targets.

    Raises:
        ValueError: the targets are dicts.
    """
    if not isinstance(y, Tensor):
        raise ValueError(
            f"model.loss is not given, and targets that are a dict, {described(y)}, have no loss of their own: give "
            f"model.loss a fomal.inner.Loss of your own."
        )
    return _SQUARED_ERROR if y.is_floating_point() else _CROSS_ENTROPY


def looks_like_labels(y: Tensor) -> bool:
    """Tell whether floating-point targets (B, *target) are several zeros and ones, as labels are."""
    return y.is_floating_point() and y[0].numel() > 1 and bool(((y == 0) | (y == 1)).all())


def _refuse_labels(loss: Loss, y: Data) -> None:
    refuse_several(loss, y)
    if not y.is_floating_point():
        raise ValueError(
            f"{type(loss).__name__} needs floating-point targets, but the data's are {y.dtype} labels: use another "
            f"loss, e.g. fomal.inner.CrossEntropy, or give targets."
        )


def _columns(y: Tensor) -> tuple[int, ...]:
    """The shape of targets, with an axis for them where it is missing."""
    return tuple(y.shape) if y.ndim > 1 else (len(y), 1)


def _mean(t: Tensor) -> Tensor:
    """The mean over all but the first axis, (B,)."""
    if t.numel() == len(t):
        return t.reshape(-1)
    return t.flatten(1).mean(1)
