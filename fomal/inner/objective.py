"""Losses, gradients and predictions of a network for many tasks at once, each with parameters of its own."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from functools import partial
from itertools import cycle
from typing import Any

import torch
from torch import Tensor, nn

from fomal.engine.functional import forward, full_precision, helpers, plain_attention, with_helpers
from fomal.engine.tracing import Tracer
from fomal.inner.loss import Loss, losses_and_weights, mean_loss, mean_over_examples
from fomal.inner.loss_of_targets import loss_for
from fomal.inner.optimizer import InnerOptimizer, State
from fomal.models.norm import statistics_of_first, uses_support
from fomal.utils import pytree
from fomal.utils.checks import first_line
from fomal.utils.fingerprint import Snapshot, settings
from fomal.utils.pytree import Data, leaves, map_leaves
from fomal.utils.tree import Tree, detach, difference, stack

log = logging.getLogger(__name__)

WIDE_TOLERANCE = 1e-6
"""How far vectorised derivatives may be off in float64, relative to the norm."""
NARROW_TOLERANCE = 1e-2
"""Likewise in less, where the network cannot be computed in float64."""


class Objective:
    """The inner problem of a network: the mean of a loss over the examples of each task, and its derivatives.

    Inputs x (T, B, *input), targets y (T, B, *target) and predictions are tensors, or nested dicts of tensors, each in
    its dtype, that share these first axes; network and loss get one task's, without the first axis.

    Tasks are vectorised with `torch.func.vmap`; a network that cannot be (data-dependent control flow, say) is run
    in a loop over the tasks, with the same results.

    Args:
        network: any module; reached through `torch.func.functional_call`.
        vectorize: True or False to decide; None tries and falls back, with one line that says why.
        tracer: traces what is vectorised, and replays it; None: everything runs as it is written.
        loss: of the tasks; None: by the targets, see `loss_for`.
        query_loss: of their query sets; None: the same.
    """

    def __init__(
        self,
        network: nn.Module,
        vectorize: bool | None = None,
        tracer: Tracer | None = None,
        loss: Loss | None = None,
        query_loss: Loss | None = None,
    ) -> None:
        self.network, self.loss, self.query_loss = network, loss, query_loss
        self.tracer = tracer
        self.vectorize = vectorize
        self.is_given = vectorize is not None
        self._order = 0  # up to which order of derivatives `vectorize` is settled
        self._with_query = False  # whether for the query sets' loss too
        self._seen: Snapshot | None = None  # the network that it is settled for
        self._own: set[int] = set()  # what the network's forward changes in it
        self._is_settling = False

    def __getstate__(self) -> dict[str, Any]:
        """Without what is settled, which is found again."""
        return {**self.__dict__, "_order": 0, "_seen": None, "_own": set()}

    def is_settled(self, second_order: bool, with_query: bool = False) -> bool:
        """Tell whether it is settled how to run over tasks, for first or second derivatives, for the network as it is.

        Args:
            second_order: see `settle`.
            with_query: whether the loss of the query sets, where it is another one, is needed too.
        """
        if self._order < 1 + second_order or (with_query and not self._with_query):
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

    def eager(self) -> Objective:
        """The same without traces."""
        plain = copy(self)
        plain.tracer = None
        return plain

    def is_of(self, network: nn.Module, loss: Loss | None, query_loss: Loss | None) -> bool:
        """Tell whether it is of these very objects."""
        return self.network is network and self.loss is loss and self.query_loss is query_loss

    def for_queries(self) -> Objective:
        """The same with the loss of the query sets."""
        if self.query_loss is None:
            return self
        other = copy(self)
        other.loss, other.query_loss = self.query_loss, None
        return other

    def loss_of(self, y: Data) -> Loss:
        """The loss of targets (..., *target); ValueError where none is given for targets that are dicts."""
        return loss_for(y) if self.loss is None else self.loss

    def losses_used(self) -> tuple[Any, ...]:
        """All that results depend on of both losses, hashable: equal for equal settings."""
        return tuple(None if loss is None else settings(loss) for loss in (self.loss, self.query_loss))

    def settle(
        self,
        params: Tree,
        x: Data,
        y: Data,
        second_order: bool = False,
        query: Sequence[Data] = (),
    ) -> None:
        """Decide `vectorize`, unless it was given: try it on two tasks, and compare with the loop.

        Both are computed in float64, in which two right ways hardly differ, or else with the full precision of what
        is at hand. Where a derivative is infinite or NaN nothing is decided, and these tasks run in a loop.

        Args:
            params: one set of parameters.
            x: (2, B, *input).
            y: (2, B, ...) labels or targets.
            second_order: whether derivatives of the gradients will be needed too; some of torch's operations have
                wrong ones under vmap.
            query: likewise x and y for the query sets' loss, where it is another one.
        """
        before = Snapshot(self.network)
        examples = (x, y, *query)
        reason: str | None = ""
        if not self.is_given:
            reason = self._settled(stack(params, len(leaves(x)[0])), examples, second_order)
            self.vectorize = reason == ""
        self._seen = Snapshot(self.network)
        changed = before.changed(self._seen)
        self._own = changed if len(before.values) == len(self._seen.values) else set()
        self._order, self._with_query = (0 if reason is None else 1 + second_order), bool(query)
        if reason:
            log.warning(
                "%s cannot be vectorised over tasks, so tasks run one after the other (slower, same results): %s; "
                "model.execution.vectorize: false says so beforehand, true vectorises them all the same",
                " with ".join(type(part).__name__ for part in (self.network, self.loss, self.query_loss) if part),
                reason,
            )

    def _settled(self, params: Tree, examples: tuple[Data, ...], second_order: bool) -> str | None:
        """Why the tasks cannot be vectorised; empty where they can, None where it cannot be told."""
        was_training = self.network.training
        modes = [(module, module.training) for module in self.network.modules()]
        self.network.eval()  # dropout would make the two differ
        self._is_settling = True
        try:
            # Rounding is not what is looked for.
            device = leaves(examples)[0].device
            with torch.autocast(device.type, enabled=False), full_precision(device), _twice(second_order):
                reason = self._try(params, examples, second_order)
        finally:
            for module, mode in modes:
                module.training = mode
            self._is_settling = False
        if was_training and reason == "":  # there may be random operations that vmap refuses
            self.vectorize = True
            parts = self.parts(*examples)
            reason = _reason(lambda: [part._over_tasks(part._loss)(params, x, y) for part, x, y in parts])
        return reason

    def parts(self, x: Data, y: Data, *query: Data) -> list[tuple[Objective, Data, Data]]:
        """The parts to settle: the objective, and that of the query sets where examples of these are given."""
        return [(self, x, y), *([(self.for_queries(), *query)] if query else [])]

    def _try(self, params: Tree, examples: tuple[Data, ...], second_order: bool) -> str | None:
        """See `_settled`."""

        def derivatives(params: Tree, examples: tuple[Data, ...], second_order: bool) -> list[Tree]:
            parts = self.parts(*examples)
            return [found for part, x, y in parts for found in part._derivatives(params, x, y, second_order)]

        run: Callable[..., list[Tree]] = with_helpers(self.network, derivatives)
        args = detach(helpers(self.network, set(params))), params, examples
        wide = map_leaves(lambda leaf: leaf.double() if leaf.is_floating_point() else leaf, args)
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
        reason = reason or _difference(found, expected, tolerance, second_order)
        return reason or _reason(lambda: run(*args, second_order))

    def _derivatives(self, params: Tree, x: Data, y: Data, second_order: bool) -> list[Tree]:
        """Gradients and, if asked for, the gradient of their squared norm, which has the Hessian in it."""

        def squared_norm(params: Tree) -> Tensor:
            return torch.stack([g.square().sum() for g in self.gradients(params, x, y)[0].values()]).sum()

        first = self.gradients(params, x, y)[0]
        return [first, torch.func.grad(squared_norm)(params)] if second_order else [first]

    def gradients(
        self, params: Tree, x: Data, y: Data, frozen: Tree | None = None, support: Data | None = None
    ) -> tuple[Tree, Tensor]:
        """Each task's loss and its gradient.

        Args:
            params: stacked parameters, (T, ...) each.
            x: (T, B, *input).
            y: (T, B, ...) labels or targets.
            frozen: the network's other parameters, not stacked: all tasks have the same ones, and their gradient is
                not computed.
            support: see `support_for`.

        Returns:
            The gradients, stacked, and the losses (T,).
        """
        args = (params, frozen or {}), x, y, *_if_given(support)
        return self.run(("gradients", self.losses_used()), self._gradients, *args)  # type: ignore[no-any-return]

    def _gradients(self, both: tuple[Tree, Tree], x: Data, y: Data, *support: Data) -> tuple[Tree, Tensor]:
        params, frozen = both

        def loss(params: Tree, x: Data, y: Data, *support: Data) -> Tensor:
            return self._loss({**frozen, **params}, x, y, *support)

        return self._over_tasks(torch.func.grad_and_value(loss))(params, x, y, *support)  # type: ignore[no-any-return]

    def step(
        self, optimizer: InnerOptimizer, params: Tree, state: State, x: Data, y: Data, frozen: Tree
    ) -> tuple[Tree, State, Tensor]:
        """One step of an optimiser on each task's mini-batch: parameters and state after it, and the losses before it.

        Args:
            optimizer: one whose `update` does the same in each step.
            params: stacked parameters, (T, ...) each.
            state: the optimiser's stacked state.
            x: (T, B, *input).
            y: (T, B, ...) labels or targets.
            frozen: as for `gradients`.
        """

        def step(both: tuple[Tree, Tree], state: State, x: Data, y: Data) -> tuple[Tree, State, Tree, Tensor]:
            gradient, loss = self._gradients(both, x, y)
            return *optimizer.update(gradient, state, both[0]), gradient, loss  # a trace is judged by its gradient

        name = "step", settings(optimizer), self.losses_used()
        moved, state, _, loss = self.run(name, step, (params, frozen), state, x, y)
        return moved, state, loss

    def hessian_products(self, params: Tree, x: Data, y: Data, vectors: Tree) -> Tree:
        """Each task's Hessian of the loss times a vector of its own, by differentiating twice.

        Args:
            params: stacked parameters, (T, ...) each.
            x: (T, B, *input).
            y: (T, B, ...) labels or targets.
            vectors: (T, ...) each, with the names and shapes of `params`.
        """

        # Reverse over the vectorised gradient, the nesting that `settle` compares with the loop; under an outer vmap
        # torch has no second derivative of its batch norm.
        def along(params: Tree) -> Tensor:
            gradients = self.gradients(params, x, y)[0]
            return torch.stack([(g * vectors[name]).sum() for name, g in gradients.items()]).sum()

        with plain_attention():
            return torch.func.grad(along)(params)  # type: ignore[no-any-return]

    def losses(self, params: Tree, x: Data, y: Data, support: Data | None = None) -> Tensor:
        """Each task's loss, (T,), on x (T, B, *input) and y (T, B, ...); for `support` see `support_for`."""
        args = params, x, y, *_if_given(support)
        return self.run(("losses", self.losses_used()), self._over_tasks(self._loss), *args)  # type: ignore[no-any-return]

    def predict(self, params: Tree, x: Data, support: Data | None = None) -> Data:
        """Predictions (T, B, *prediction) with all of a task's inputs x (T, B, *input) in one forward pass.

        For `support` see `support_for`.
        """
        args = params, x, *_if_given(support)
        return self.run(("predict", self.losses_used()), self._over_tasks(self._prediction), *args)

    def support_for(self, support_x: Data, query_x: Data) -> Data | None:
        """The support sets (T, S, *input), where batch norms take their statistics for the queries; else None."""
        return support_x if uses_support(self.network) and _kinds(support_x) == _kinds(query_x) else None

    def predict_inductive(self, params: Tree, support_x: Data, query_x: Data) -> Data:
        """Predictions (T, Q, *prediction), each query forwarded with the whole support set and nothing else.

        Where the two differ in structure, in the shapes of single examples or in dtypes (a query may lack what the
        support has), they cannot share a batch, and each query is forwarded as a batch of its own.

        Args:
            params: stacked parameters.
            support_x: (T, S, *input).
            query_x: (T, Q, *input).
        """
        alike = _kinds(support_x) == _kinds(query_x)

        def one(params: Tree, support: Data, query: Data) -> Data:
            """(S, *input) and (*input) to (*prediction)."""
            query = map_leaves(lambda t: t[None], query)
            return map_leaves(lambda t: t[0], self._prediction(params, query, support if alike else None))

        def task(params: Tree, support: Data, queries: Data) -> Data:
            if self.vectorize:
                return torch.func.vmap(one, in_dims=(None, None, 0), randomness="different")(params, support, queries)
            count = len(leaves(queries)[0])
            return pytree.stack([one(params, support, map_leaves(lambda t, q=q: t[q], queries)) for q in range(count)])

        return self.run(("inductive", self.losses_used()), self._over_tasks(task), params, support_x, query_x)

    def losses_inductive(self, params: Tree, support: tuple[Data, Data], query: tuple[Data, Data]) -> Tensor:
        """Each task's query loss, (T,), each query forwarded as by `predict_inductive`.

        Args:
            params: stacked parameters.
            support: inputs (T, S, *input) and targets (T, S, *target).
            query: likewise, (T, Q, ...).
        """
        alike = _kinds(support) == _kinds(query)

        def one(params: Tree, support: Data, query: Data) -> tuple[Tensor, Tensor]:
            x, y = map_leaves(lambda t: t[None], query)
            forward = partial(self._forward, params, support=support[0] if alike else None)
            losses, weights = losses_and_weights(self.loss_of(y), forward, x, y)
            return losses[0], losses.new_ones(()) if weights is None else weights[0]

        def task(params: Tree, support: Data, queries: Data) -> Tensor:
            if self.vectorize:
                vectorised = torch.func.vmap(one, in_dims=(None, None, 0), randomness="different")
                return mean_over_examples(*vectorised(params, support, queries))
            count = len(leaves(queries)[0])
            each = [one(params, support, map_leaves(lambda t, q=q: t[q], queries)) for q in range(count)]
            return mean_over_examples(*pytree.stack(each))

        return self.run(("inductive losses", self.losses_used()), self._over_tasks(task), params, support, query)  # type: ignore[no-any-return]

    def run(self, name: Any, function: Callable[..., Any], *args: Any) -> Any:
        """`function(*args)`, traced where that is on; see `Tracer.__call__`."""
        if self.tracer is None or not self.vectorize or self._is_settling:
            return function(*args)
        return self.tracer(name, function, *args)

    def _forward(self, params: Tree, x: Data, support: Data | None = None) -> Data:
        """The network's outputs for x (B, *input), in one batch behind the support set (S, *input) if there is one."""
        if support is None:
            return forward(self.network, params, x)
        examples = len(leaves(support)[0])
        with statistics_of_first(examples):
            outputs = forward(self.network, params, map_leaves(lambda *parts: torch.cat(parts), support, x))
        return map_leaves(lambda t: t[examples:], outputs)

    def _prediction(self, params: Tree, x: Data, support: Data | None = None) -> Data:
        forward = partial(self._forward, params, support=support)
        return forward(x) if self.loss is None else self.loss.predict(forward, x)

    def _loss(self, params: Tree, x: Data, y: Data, support: Data | None = None) -> Tensor:
        return mean_loss(self.loss_of(y), partial(self._forward, params, support=support), x, y)

    def _over_tasks(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        if self.vectorize:
            vectorised = torch.func.vmap(fn, randomness="different")

            def vectorised_over_tasks(*args: Any) -> Any:
                with plain_attention(kernels=leaves(args)[0].device.type == "cpu"):
                    return vectorised(*args)

            return vectorised_over_tasks

        def looped(*args: Any) -> Any:
            tasks = len(leaves(args[-1])[0])
            return pytree.stack([fn(*map_leaves(lambda leaf, t=t: leaf[t], args)) for t in range(tasks)])

        return looped


def _if_given(support: Data | None) -> tuple[Data, ...]:
    return () if support is None else (support,)


def _kinds(x: Data) -> Any:
    """The shapes of single examples of x (T, B, *input), and their dtypes, in the same dicts."""
    return map_leaves(lambda t: (t.shape[2:], t.dtype), x)


def _reason(run: Callable[[], object]) -> str:
    """Why `run` fails; empty where it does not."""
    try:
        run()
    except Exception as error:  # of vmap, and of networks that look into what they are given: many kinds
        return first_line(error)
    return ""


def _difference(found: list[Tree], expected: list[Tree], tolerance: float, second_order: bool) -> str:
    """What is wrong with `found`, in words; empty where it equals `expected` up to rounding."""
    names = cycle(("gradient", "second derivative") if second_order else ("gradient",))
    for a, b, what in zip(found, expected, names, strict=False):
        error, scale = difference(a, b)
        if not error <= tolerance * scale + torch.finfo(scale.dtype).tiny:
            return f"its vectorised {what} is off by {error / scale:.1e} of its norm"
    return ""


def _twice(wanted: bool) -> AbstractContextManager[None]:
    """Within it, attention can be differentiated twice, where that is wanted."""
    return plain_attention() if wanted else nullcontext()
