"""Losses, gradients and predictions of a network for many tasks at once, each with parameters of its own."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from fomal.engine.functional import forward, full_precision, helpers, plain_attention, with_helpers
from fomal.engine.tracing import Recorder
from fomal.inner.optimizer import InnerOptimizer, State
from fomal.utils.checks import first_line
from fomal.utils.fingerprint import Snapshot, settings
from fomal.utils.tree import Tree, detach, difference, stack

log = logging.getLogger(__name__)

WIDE_TOLERANCE = 1e-6
"""How far vectorised derivatives may be off in float64, relative to the norm."""
NARROW_TOLERANCE = 1e-2
"""Likewise in less, where the network cannot be computed in float64."""
NO_TARGET = torch.iinfo(torch.int64).min  # as label, which torch leaves out; its default, -100, may be a user's


class Objective:
    """The inner problem of a network: cross-entropy for integer labels, mean squared error for real targets.

    Tasks are vectorised with `torch.func.vmap`; a network that cannot be (data-dependent control flow, say) is run
    in a loop over the tasks, with the same results.

    Args:
        network: any module; reached through `torch.func.functional_call`.
        vectorize: True or False to decide; None tries and falls back, with one line that says why.
        recorder: records what is vectorised, and replays it; None: everything runs as it is written.
    """

    def __init__(self, network: nn.Module, vectorize: bool | None = None, recorder: Recorder | None = None) -> None:
        self.network = network
        self.recorder = recorder
        self.vectorize = vectorize
        self.is_given = vectorize is not None
        self._order = 0  # up to which order of derivatives `vectorize` is settled
        self._seen: Snapshot | None = None  # the network that it is settled for
        self._own: set[int] = set()  # what the network's forward changes in it
        self._is_settling = False

    def __getstate__(self) -> dict[str, Any]:
        """Without what is settled, which is found again."""
        return {**self.__dict__, "_order": 0, "_seen": None, "_own": set()}

    def is_settled(self, second_order: bool) -> bool:
        """Whether it is settled how to run over tasks, for first or second derivatives, for the network as it is."""
        if self._order < 1 + second_order:
            return False
        self._seen = self._seen or Snapshot(self.network)
        now = self._seen.now()
        if self._seen.changed(now) - self._own:
            return False
        self._seen = now
        return True

    def unsettle(self) -> None:
        """Decide again at the next use, e.g. because the data are others."""
        self._order = 0

    def as_written(self) -> Objective:
        """The same without recordings."""
        plain = copy(self)
        plain.recorder = None
        return plain

    def settle(self, params: Tree, x: Tensor, y: Tensor, second_order: bool = False) -> None:
        """Decide `vectorize`, unless it was given: try it on two tasks, and compare with the loop.

        Both are computed in float64, in which two right ways hardly differ, or else with the full precision of what
        is at hand. Where a derivative is infinite or NaN nothing is decided, and these tasks run in a loop.

        Args:
            params: one set of parameters.
            x: (2, B, *input).
            y: (2, B) labels, or targets (2, B, *output).
            second_order: whether derivatives of the gradients will be needed too; some of torch's operations have
                wrong ones under vmap.
        """
        before = Snapshot(self.network)
        reason: str | None = ""
        if not self.is_given:
            reason = self._settled(stack(params, len(x)), x, y, second_order)
            self.vectorize = reason == ""
        self._seen = Snapshot(self.network)
        changed = before.changed(self._seen)
        self._own = changed if len(before.values) == len(self._seen.values) else set()
        self._order = 0 if reason is None else 1 + second_order
        if reason:
            log.warning(
                "%s cannot be vectorised over tasks, so tasks run one after the other (slower, same results): %s; "
                "model.vectorize: false says so beforehand, true runs them together all the same",
                type(self.network).__name__,
                reason,
            )

    def _settled(self, params: Tree, x: Tensor, y: Tensor, second_order: bool) -> str | None:
        """Why the tasks cannot be vectorised; empty where they can, None where it cannot be told."""
        was_training = self.network.training
        modes = [(module, module.training) for module in self.network.modules()]
        self.network.eval()  # dropout would make the two differ
        self._is_settling = True
        try:
            # Rounding is not what is looked for.
            with torch.autocast(x.device.type, enabled=False), full_precision(x.device), _twice(second_order):
                reason = self._try(params, x, y, second_order)
        finally:
            for module, mode in modes:
                module.training = mode
            self._is_settling = False
        if was_training and reason == "":  # there may be random operations that vmap refuses
            self.vectorize = True
            reason = _reason(lambda: self._over_tasks(self._loss)(params, x, y))
        return reason

    def _try(self, params: Tree, x: Tensor, y: Tensor, second_order: bool) -> str | None:
        """See `_settled`."""
        run: Callable[..., list[Tree]] = with_helpers(self.network, self._derivatives)
        args = detach(helpers(self.network, set(params))), params, x, y
        wide = tree_map(lambda leaf: leaf.double() if leaf.is_floating_point() else leaf, args)
        self.vectorize = False
        tolerance = WIDE_TOLERANCE
        try:
            expected = run(*wide, second_order)
        except Exception:  # of the network: no float64 in it, or on the device
            wide, tolerance = args, NARROW_TOLERANCE
            expected = run(*wide, second_order)  # an error of the network itself is raised here
        if not all(t.isfinite().all() for part in expected for t in part.values()):
            return None
        self.vectorize = True
        found: list[Tree] = []
        reason = _reason(lambda: found.extend(run(*wide, second_order)))
        reason = reason or _difference(found, expected, tolerance)
        return reason or _reason(lambda: run(*args, second_order))

    def _derivatives(self, params: Tree, x: Tensor, y: Tensor, second_order: bool) -> list[Tree]:
        """Gradients and, if asked for, the gradient of their squared norm, which has the Hessian in it."""

        def squared_norm(params: Tree) -> Tensor:
            return torch.stack([g.square().sum() for g in self.gradients(params, x, y)[0].values()]).sum()

        first = self.gradients(params, x, y)[0]
        return [first, torch.func.grad(squared_norm)(params)] if second_order else [first]

    def gradients(self, params: Tree, x: Tensor, y: Tensor, common: Tree | None = None) -> tuple[Tree, Tensor]:
        """Each task's loss and its gradient.

        Args:
            params: stacked parameters, (T, ...) each.
            x: (T, B, *input).
            y: (T, B) labels, or targets (T, B, *output).
            common: the network's other parameters, not stacked: all tasks have the same ones, and their gradient is
                not computed.

        Returns:
            The gradients, stacked, and the losses (T,).
        """
        return self.run("gradients", self._gradients, params, x, y, common or {})  # type: ignore[no-any-return]

    def _gradients(self, params: Tree, x: Tensor, y: Tensor, common: Tree) -> tuple[Tree, Tensor]:
        def loss(params: Tree, x: Tensor, y: Tensor) -> Tensor:
            return self._loss({**common, **params}, x, y)

        return self._over_tasks(torch.func.grad_and_value(loss))(params, x, y)  # type: ignore[no-any-return]

    def step(
        self, optimizer: InnerOptimizer, params: Tree, state: State, x: Tensor, y: Tensor, common: Tree
    ) -> tuple[Tree, State, Tensor]:
        """One step of an optimiser on each task's mini-batch: parameters and state after it, and the losses before it.

        Args:
            optimizer: one whose `update` does the same in each step.
            params: stacked parameters, (T, ...) each.
            state: the optimiser's stacked state.
            x: (T, B, *input).
            y: (T, B) labels, or targets (T, B, *output).
            common: as for `gradients`.
        """

        def step(params: Tree, state: State, x: Tensor, y: Tensor, common: Tree) -> tuple[Tree, State, Tree, Tensor]:
            gradient, loss = self._gradients(params, x, y, common)
            return *optimizer.update(gradient, state, params), gradient, loss  # a recording is judged by its gradient

        moved, state, _, loss = self.run(("step", settings(optimizer)), step, params, state, x, y, common)
        return moved, state, loss

    def hessian_products(self, params: Tree, x: Tensor, y: Tensor, vectors: Tree) -> Tree:
        """Each task's Hessian of the loss times a vector of its own, by differentiating twice.

        Args:
            params: stacked parameters, (T, ...) each.
            x: (T, B, *input).
            y: (T, B) labels, or targets (T, B, *output).
            vectors: (T, ...) each, with the names and shapes of `params`.
        """

        # Reverse over the vectorised gradient, the nesting that `settle` compares with the loop; under an outer vmap
        # torch has no second derivative of its batch norm.
        def along(params: Tree) -> Tensor:
            gradients = self.gradients(params, x, y)[0]
            return torch.stack([(g * vectors[name]).sum() for name, g in gradients.items()]).sum()

        with plain_attention():
            return torch.func.grad(along)(params)  # type: ignore[no-any-return]

    def losses(self, params: Tree, x: Tensor, y: Tensor) -> Tensor:
        """Each task's loss, (T,), on x (T, B, *input) and y (T, B, ...)."""
        return self.run("losses", self._over_tasks(self._loss), params, x, y)  # type: ignore[no-any-return]

    def predict(self, params: Tree, x: Tensor) -> Tensor:
        """Outputs (T, B, *output) with all of a task's inputs x (T, B, *input) in one forward pass."""
        return self.run("predict", self._over_tasks(self._forward), params, x)  # type: ignore[no-any-return]

    def predict_alone(self, params: Tree, support_x: Tensor, query_x: Tensor) -> Tensor:
        """Outputs (T, Q, *output) with each query forwarded together with the whole support set and nothing else.

        Args:
            params: stacked parameters.
            support_x: (T, S, *input).
            query_x: (T, Q, *input).
        """

        def with_support(params: Tree, support: Tensor, query: Tensor) -> Tensor:
            return self._forward(params, torch.cat([support, query[None]]))[-1]  # (S + 1, *input) -> (*output)

        def task(params: Tree, support: Tensor, queries: Tensor) -> Tensor:
            if self.vectorize:
                return torch.func.vmap(with_support, in_dims=(None, None, 0), randomness="different")(
                    params, support, queries
                )
            return torch.stack([with_support(params, support, query) for query in queries])

        return self.run("alone", self._over_tasks(task), params, support_x, query_x)  # type: ignore[no-any-return]

    def run(self, name: Any, function: Callable[..., Any], *args: Any) -> Any:
        """`function(*args)`, recorded where that is on; see `Recorder.__call__`."""
        if self.recorder is None or not self.vectorize or self._is_settling:
            return function(*args)
        return self.recorder(name, function, *args)

    def _forward(self, params: Tree, x: Tensor) -> Tensor:
        return forward(self.network, params, x)  # type: ignore[no-any-return]

    def _loss(self, params: Tree, x: Tensor, y: Tensor) -> Tensor:
        output = self._forward(params, x)
        output = output.to(torch.promote_types(output.dtype, torch.float32))
        y = y.to(output.dtype) if y.is_floating_point() else y
        return F.mse_loss(output, y) if y.is_floating_point() else F.cross_entropy(output, y, ignore_index=NO_TARGET)

    def _over_tasks(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        if self.vectorize:
            vectorised = torch.func.vmap(fn, randomness="different")

            def together(*args: Any) -> Any:
                with plain_attention(kernels=tree_flatten(args)[0][0].device.type == "cpu"):
                    return vectorised(*args)

            return together

        def looped(*args: Any) -> Any:
            tasks = len(args[-1])
            results = [fn(*tree_map(lambda leaf, t=t: leaf[t], args)) for t in range(tasks)]
            leaves = zip(*(tree_flatten(result)[0] for result in results), strict=True)
            return tree_unflatten([torch.stack(leaf) for leaf in leaves], tree_flatten(results[0])[1])

        return looped


def _reason(run: Callable[[], object]) -> str:
    """Why `run` fails; empty where it does not."""
    try:
        run()
    except Exception as error:  # of vmap, and of networks that look into what they are given: many kinds
        return first_line(error)
    return ""


def _difference(found: list[Tree], expected: list[Tree], tolerance: float) -> str:
    """What is wrong with `found`, in words; empty where it equals `expected` up to rounding."""
    for a, b, what in zip(found, expected, ("gradient", "second derivative"), strict=False):
        error, scale = difference(a, b)
        if not error <= tolerance * scale + torch.finfo(scale.dtype).tiny:
            return f"its vectorised {what} is off by {error / scale:.1e} of its norm"
    return ""


def _twice(wanted: bool) -> AbstractContextManager[None]:
    """Within it, attention can be differentiated twice, where that is wanted."""
    return plain_attention() if wanted else nullcontext()
