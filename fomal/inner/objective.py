"""Losses, gradients and predictions of a network for many tasks at once, each with parameters of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fomal.engine.functional import forward, helpers, plain_attention, with_helpers
from fomal.engine.tracing import Tracer
from fomal.engine.vectorized import Vectorized, over_tasks
from fomal.inner.loss import Forward, Loss, losses_and_weights, mean_over_examples, sum_over_examples
from fomal.inner.loss_of_targets import loss_for
from fomal.inner.optimizer import InnerOptimizer, State
from fomal.models.norm import statistics_of_first, uses_support
from fomal.utils import pytree
from fomal.utils.fingerprint import settings
from fomal.utils.pytree import Data, leaves, map_leaves
from fomal.utils.tree import Tree, detach, stack


class Objective:
    """The inner problem of a network: the mean of a loss over the examples of each task, and its derivatives.

    In what follows params are stacked parameters, (T, ...) each; inputs x (T, B, *input), targets y (T, B, *target) and
    predictions are tensors, or nested dicts of tensors, each in its dtype, that share these first axes. Network and
    loss get those of one task, without the first axis.

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
        self.tracer, self.vectorize, self.is_given = tracer, vectorize, vectorize is not None
        used = " with ".join(type(part).__name__ for part in (network, loss, query_loss) if part is not None)
        self.reduction = "mean"
        self._backend = Vectorized(network, used)
        self.unsettle()

    def __getstate__(self) -> dict[str, Any]:
        """Without what is settled, which is found again."""
        return {**self.__dict__, "_settled": (0, False)}

    def is_settled(self, second_order: bool, with_query: bool = False) -> bool:
        """Tell whether it is settled how to run over tasks, for the network as it is; see `settle`.

        Args:
            second_order: for second derivatives too.
            with_query: for the loss of the query sets too, where it is another one.
        """
        if self._backend.look():
            self.unsettle()
        return self._settled[0] >= 1 + second_order and self._settled[1] >= with_query

    def unsettle(self) -> None:
        """Decide again at the next use, e.g. because the data are others."""
        self._settled = 0, False  # up to which order of derivatives, and whether for the query sets' loss too

    def eager(self, vectorize: bool | None = None) -> Objective:
        """The same without traces; with `vectorize`, in a loop over tasks or not."""
        plain = copy(self)
        plain.tracer, plain.vectorize = None, self.vectorize if vectorize is None else vectorize
        return plain

    def is_of(self, network: nn.Module, loss: Loss | None, query_loss: Loss | None) -> bool:
        """Tell whether it is of these very objects."""
        return self.network is network and self.loss is loss and self.query_loss is query_loss

    def for_queries(self) -> Objective:
        """The same with the loss of the query sets."""
        if self.query_loss is None:
            return self.reduced_by("mean")
        other = copy(self.reduced_by("mean"))
        other.loss, other.query_loss = self.query_loss, None
        return other

    def reduced_by(self, reduction: str) -> Objective:
        """The same with the "mean" or the "sum" of a mini-batch's losses as a task's loss."""
        if reduction == self.reduction:
            return self
        other = copy(self)
        other.reduction = reduction
        return other

    def loss_of(self, y: Data) -> Loss:
        """The loss of targets (..., *target); ValueError where none is given for targets that are dicts."""
        return loss_for(y) if self.loss is None else self.loss

    def losses_used(self) -> tuple[Any, ...]:
        """All that results depend on of both losses and their reduction, hashable: equal for equal settings."""
        losses = (None if loss is None else settings(loss) for loss in (self.loss, self.query_loss))
        return (*losses, self.reduction)

    def settle(self, params: Tree, x: Data, y: Data, second_order: bool = False, query: Sequence[Data] = ()) -> None:
        """Decide `vectorize`, unless it was given: try it on two tasks, and compare with the loop; see `Vectorized`.

        Where a derivative is infinite or NaN nothing is decided, and these tasks run in a loop.

        Args:
            params: one set of parameters, not stacked.
            x: of two tasks.
            y: likewise.
            second_order: whether derivatives of the gradients will be needed too; some of torch's operations have
                wrong ones under vmap.
            query: likewise x and y for the query sets' loss, where it is another one.
        """
        self._settled = 1 + second_order, bool(query)
        if self.is_given:
            self._backend.look()  # to notice changes from now on
            return

        def derivatives(vectorize: bool) -> Callable[..., list[Tree]]:
            eager = self.eager(vectorize)
            return with_helpers(self.network, partial(eager._derivatives, second_order=second_order))

        args = detach(helpers(self.network, set(params))), stack(params, len(leaves(x)[0])), (x, y, *query)
        found = self._backend.can(derivatives(vectorize=False), derivatives(vectorize=True), args, second_order)
        self.vectorize = bool(found)
        if found is None:
            self.unsettle()

    def parts(self, x: Data, y: Data, *query: Data) -> list[tuple[Objective, Data, Data]]:
        """The parts to settle: the objective, and that of the query sets where examples of these are given."""
        return [(self, x, y), *([(self.for_queries(), *query)] if query else [])]

    def _derivatives(self, params: Tree, examples: tuple[Data, ...], second_order: bool) -> list[Tree]:
        """Each part's gradients and, if asked for, those of their squared norm, which have the Hessian in them."""
        found: list[Tree] = []
        for part, x, y in self.parts(*examples):

            def squared_norm(params: Tree, part: Objective = part, x: Data = x, y: Data = y) -> Tensor:
                return torch.stack([g.square().sum() for g in part.gradients(params, x, y)[0].values()]).sum()

            found.append(part.gradients(params, x, y)[0])
            found += [torch.func.grad(squared_norm)(params)] if second_order else []
        return found

    def gradients(
        self, params: Tree, x: Data, y: Data, frozen: Tree | None = None, support: Data | None = None
    ) -> tuple[Tree, Tensor]:
        """Each task's gradient, stacked, and loss, (T,).

        Args:
            params: those that are differentiated by.
            x: inputs.
            y: targets.
            frozen: the network's other parameters, not stacked: all tasks have the same ones.
            support: see `support_for`.
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
            params: as for `gradients`, like x, y and frozen.
            state: the optimiser's stacked state.
            x: inputs.
            y: targets.
            frozen: other parameters.
        """

        def step(both: tuple[Tree, Tree], state: State, x: Data, y: Data) -> tuple[Tree, State, Tree, Tensor]:
            gradient, loss = self._gradients(both, x, y)
            return *optimizer.update(gradient, state, both[0]), gradient, loss  # a trace is judged by its gradient

        name = "step", settings(optimizer), self.losses_used()
        moved, state, _, loss = self.run(name, step, (params, frozen), state, x, y)
        return moved, state, loss

    def hessian_products(self, params: Tree, x: Data, y: Data, vectors: Tree) -> Tree:
        """Each task's Hessian of the loss times one of `vectors`, which are shaped and named as `params`."""

        # Reverse over the vectorised gradient, the nesting that `settle` compares with the loop; under an outer vmap
        # torch has no second derivative of its batch norm.
        def along(params: Tree) -> Tensor:
            gradients = self.gradients(params, x, y)[0]
            return torch.stack([(g * vectors[name]).sum() for name, g in gradients.items()]).sum()

        with plain_attention():
            return torch.func.grad(along)(params)  # type: ignore[no-any-return]

    def losses(self, params: Tree, x: Data, y: Data, support: Data | None = None) -> Tensor:
        """Each task's loss, (T,); for `support` see `support_for`."""
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
        """
        alike = _kinds(support_x) == _kinds(query_x)

        def one(params: Tree, support: Data, query: Data) -> Data:
            return map_leaves(lambda t: t[0], self._prediction(params, query, support if alike else None))

        task = self._each_query(one)
        return self.run(("inductive", self.losses_used()), self._over_tasks(task), params, support_x, query_x)

    def losses_inductive(self, params: Tree, support: tuple[Data, Data], query: tuple[Data, Data]) -> Tensor:
        """Each task's query loss, (T,), each of its queries, inputs and targets, as by `predict_inductive`."""
        alike = _kinds(support) == _kinds(query)

        def one(params: Tree, support: tuple[Data, Data], query: tuple[Data, Data]) -> tuple[Tensor, Tensor]:
            losses, weights = self._losses(params, *query, support=support[0] if alike else None)
            return losses[0], losses.new_ones(()) if weights is None else weights[0]

        each = self._each_query(one)

        def task(*args: Any) -> Tensor:
            return mean_over_examples(*each(*args))

        return self.run(("inductive losses", self.losses_used()), self._over_tasks(task), params, support, query)  # type: ignore[no-any-return]

    def _each_query(self, function: Callable[[Tree, Any, Any], Any]) -> Callable[[Tree, Any, Any], Any]:
        """The function of one task's parameters, support and queries that is `function` of each query, (1, ...)."""

        def one(params: Tree, support: Any, query: Any) -> Any:
            return function(params, support, map_leaves(lambda t: t[None], query))

        def each(params: Tree, support: Any, queries: Any) -> Any:
            if self.vectorize:
                return torch.func.vmap(one, in_dims=(None, None, 0), randomness="different")(params, support, queries)
            count = len(leaves(queries)[0])
            return pytree.stack([one(params, support, map_leaves(lambda t, q=q: t[q], queries)) for q in range(count)])

        return each

    def run(self, name: Any, function: Callable[..., Any], *args: Any) -> Any:
        """`function(*args)`, traced where that is on; see `Tracer.__call__`."""
        if self.tracer is None or not self.vectorize:
            return function(*args)
        return self.tracer(name, function, *args)

    def _behind(self, params: Tree, x: Data, support: Data) -> tuple[Forward, Data, int]:
        """The network, x (B, *input) behind the support set (S, *input), and S.

        A loss may take the examples of the batch apart; batch norms know which part of them is the support's.
        """
        batch = map_leaves(lambda *parts: torch.cat(parts), support, x)
        first, total = len(leaves(support)[0]), len(leaves(batch)[0])

        def outputs(x: Data) -> Data:
            with statistics_of_first(len(leaves(x)[0]) * first // total):
                return forward(self.network, params, x)

        return outputs, batch, first

    def _prediction(self, params: Tree, x: Data, support: Data | None = None) -> Data:
        predict = (lambda forward, x: forward(x)) if self.loss is None else self.loss.predict
        if support is None:
            return predict(partial(forward, self.network, params), x)
        outputs, batch, first = self._behind(params, x, support)
        return map_leaves(lambda t: t[first:], predict(outputs, batch))

    def _losses(self, params: Tree, x: Data, y: Data, support: Data | None) -> tuple[Tensor, Tensor | None]:
        """The losses (B,) and weights (B,) of examples, behind the support set if there is one."""
        loss = self.loss_of(y)
        if support is None:
            return losses_and_weights(loss, partial(forward, self.network, params), x, y)
        outputs, batch, first = self._behind(params, x, support)
        targets = map_leaves(lambda t: torch.cat([t[:1].expand(first, *t.shape[1:]), t]), y)  # the first are any
        losses, weights = losses_and_weights(loss, outputs, batch, targets)
        return losses[first:], None if weights is None else weights[first:]

    def _loss(self, params: Tree, x: Data, y: Data, support: Data | None = None) -> Tensor:
        reduce = mean_over_examples if self.reduction == "mean" else sum_over_examples
        return reduce(*self._losses(params, x, y, support))

    def _over_tasks(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return over_tasks(function, bool(self.vectorize))


def _if_given(support: Data | None) -> tuple[Data, ...]:
    return () if support is None else (support,)


def _kinds(x: Data) -> Any:
    """The shapes of single examples of x (T, B, *input), and their dtypes, in the same dicts."""
    return map_leaves(lambda t: (t.shape[2:], t.dtype), x)
