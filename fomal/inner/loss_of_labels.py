"""Losses of labels; each `__call__` is as `Loss` says, (B, ...) to (B,)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fomal.inner.loss import Forward, Loss, constant, one_tensor, refuse_several, refuse_unless_positive
from fomal.tasks.episode import NO_TARGET
from fomal.utils.checks import nonnegative
from fomal.utils.pytree import Data, leaves, map_leaves


class CrossEntropy(Loss):
    """Cross-entropy of int64 labels y and logits z = forward(x), -sum_c q_c log softmax(z)_c.

    Here q puts 1 - s + s / C on the label and s / C on each of the other classes, s = `label_smoothing` (Szegedy et al.
    2016, arXiv:1512.00567, section 7); s = 0 is the negative log-likelihood, equation 4.108 of Bishop 2006.

    Labels may be one for each example, y (B,) with logits (B, C), or many, such as one for each token or pixel,
    y (B, *places) with logits (B, *places, C), classes last. `fomal.tasks.episode.NO_TARGET` in place of a label leaves
    it out. An example's loss is the mean over its labels, and it weighs as much as these do together, so that the mean
    over examples is the mean over all labels, as torch's.

    Args:
        label_smoothing: s, at least 0 and below 1.
        class_weights: w_c > 0, one for each class: the mean over labels is sum_i w_(y_i) l_i / sum_i w_(y_i), as with
            torch's `weight`, so that a common factor changes nothing.

    Raises:
        ValueError: for other settings; for labels that are none, other shapes, and another number of classes.
    """

    def __init__(self, label_smoothing: float = 0.0, class_weights: list[float] | None = None) -> None:
        nonnegative(label_smoothing=label_smoothing)
        if label_smoothing >= 1:
            raise ValueError(f"label_smoothing={label_smoothing} must be below 1.")
        if class_weights is not None:
            class_weights = refuse_unless_positive("class_weights", class_weights)
        self.label_smoothing, self.class_weights = label_smoothing, class_weights

    def __call__(self, forward: Forward, x: Data, y: Tensor) -> Tensor:
        """See `Loss`."""
        logits = forward(x)  # (B, *places, C)
        losses = F.cross_entropy(
            logits.flatten(0, -2),
            y.flatten(),
            weight=None if self.class_weights is None else constant(self.class_weights, logits),
            ignore_index=NO_TARGET,
            reduction="none",
            label_smoothing=self.label_smoothing,
        )  # 0 where there is no target
        if y.ndim == 1 and self.class_weights is None:
            return losses
        losses = losses.view(y.shape)
        weights = self._each(y).to(losses.dtype)  # which torch has multiplied with
        return _total(losses) / _total(weights).clamp_min(torch.finfo(losses.dtype).tiny)

    def weights(self, y: Tensor) -> Tensor:
        """See `Loss`: 0 without a target, otherwise the weight of the label's class; the sum of an example's labels."""
        each = self._each(y)
        return each if y.ndim == 1 else _total(each)

    def _each(self, y: Tensor) -> Tensor:
        """The weight of each label, shaped as y."""
        given = y != NO_TARGET
        if self.class_weights is None:
            return given
        weights = torch.tensor(self.class_weights, dtype=torch.float64, device=y.device)
        return weights[y.where(given, 0)] * given

    def check(self, forward: Forward, x: Data, y: Tensor, ways: int) -> None:
        """See `Loss`."""
        _refuse_numbers(self, y)
        found, wanted = tuple(one_tensor(self, forward, x).shape), (*y.shape, ways)
        if self.class_weights is not None and len(self.class_weights) != ways:
            raise ValueError(
                f"class_weights of CrossEntropy has {len(self.class_weights)} entries, but data.ways={ways}: give one "
                f"for each class."
            )
        if found == wanted:
            return
        if y.ndim > 1:
            raise ValueError(
                f"model.network returns {found[1:]} per example, but an example's labels are {wanted[1:-1]} and "
                f"data.ways={ways}: give outputs {wanted[1:]}, the classes last; of one-hot vectors take y.argmax(-1)."
            )
        raise ValueError(
            f"model.network returns {found[1:]} per example, but data.ways={ways}: give the network {ways} outputs, or "
            f"change data.ways."
        )


class BradleyTerry(Loss):
    """Negative log-likelihood of preferences between two things, -log sigmoid(r_y - r_(1 - y)), r_i = forward(x_i).

    The model of Bradley & Terry 1952 (Biometrika 39, 324-345) for rewards r, as equation (1) of Christiano et al. 2017
    (arXiv:1706.03741). Inputs are pairs x (B, 2, *input), in dicts each tensor, and the network sees each of the two as
    an input of its own, for which it gives one reward, (B,) or (B, 1); y (B,) int64 says which is preferred, 0 or 1, so
    `ways` is 2. What is predicted are both rewards, (B, 2): their softmax is the probability that each is preferred.

    Raises:
        ValueError: at first use, for other shapes, targets that are no labels, or another number of `ways` than 2.
    """

    def __call__(self, forward: Forward, x: Data, y: Tensor) -> Tensor:
        """See `Loss`."""
        return F.cross_entropy(self.predict(forward, x), y, ignore_index=NO_TARGET, reduction="none")

    def weights(self, y: Tensor) -> Tensor:
        """See `Loss`: 0 without a target."""
        return y != NO_TARGET

    def predict(self, forward: Forward, x: Data) -> Tensor:
        """Both rewards, (B, 2)."""
        rewards: Tensor = forward(_apart(x))
        return rewards.reshape(-1, 2)

    def outputs(self, size: int) -> int:
        """See `Loss`: the reward alone."""
        return 1

    def check(self, forward: Forward, x: Data, y: Tensor, ways: int) -> None:
        """See `Loss`."""
        _refuse_numbers(self, y)
        if ways != 2 or y.ndim != 1:
            raise ValueError(
                f"BradleyTerry needs one label of 2 for each pair, but the labels are {tuple(y.shape[1:])} per example "
                f"of {ways} classes: give Episode.ways=2 and labels (tasks, examples), 0 or 1."
            )
        if single := [t for t in leaves(x) if t.ndim < 2 or t.shape[1] != 2]:
            raise ValueError(
                f"BradleyTerry needs pairs, but the data's inputs are {tuple(single[0].shape[1:])} per example: give "
                f"(2, *input), the two that are compared."
            )
        found = tuple(one_tensor(self, forward, _apart(x)).shape)
        if found not in ((2 * len(y),), (2 * len(y), 1)):
            raise ValueError(f"model.network returns {found[1:]} for each of a pair: give it one output, the reward.")


def _refuse_numbers(loss: Loss, y: Data) -> None:
    refuse_several(loss, y)
    if y.is_floating_point():
        raise ValueError(
            f"{type(loss).__name__} needs int64 labels, but the data's targets are {y.dtype}: use another loss, e.g. "
            f"fomal.inner.SquaredError, or give labels."
        )


def _total(t: Tensor) -> Tensor:
    """The sum over all but the first axis, (B,)."""
    return t if t.ndim == 1 else t.flatten(1).sum(1)


def _apart(x: Data) -> Data:
    """The parts of pairs (B, 2, *input), (2 B, *input)."""
    return map_leaves(lambda t: t.flatten(0, 1), x)
