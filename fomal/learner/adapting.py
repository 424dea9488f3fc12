"""The part of a learner that adapts: from its network, settings and tasks to inner loops that are ready to run."""

from __future__ import annotations

import lightning as L
import torch
from torch import nn

from fomal.engine.chunking import Chunks
from fomal.engine.tracing import Tracer
from fomal.inner.loop import InnerLoop, gather_examples
from fomal.inner.loss import Loss, check_loss
from fomal.inner.loss_of_targets import looks_like_labels
from fomal.inner.objective import Objective
from fomal.inner.optimizer import InnerOptimizer, State
from fomal.learner.settings import Execution, InnerSchedule, OuterStep
from fomal.models.norm import other_norms, use_batch_statistics
from fomal.models.parameters import matching
from fomal.models.usable import checked, refuse_unusable
from fomal.outer.rule import OuterRule
from fomal.tasks.episode import Episode
from fomal.tasks.sampler import MinibatchIndices, minibatch_indices, separate_tail
from fomal.utils import tree
from fomal.utils.output import rank_zero_info, rank_zero_warn
from fomal.utils.pytree import map_leaves
from fomal.utils.tree import Tree


class Adapting(L.LightningModule):
    """A module that adapts an initialisation to tasks; its settings are those of `MetaLearner`.

    Attributes:
        adapted: names of the parameters that the inner loop adapts; None: all.
        carried: the carried state of the inner optimiser; None: it has not begun.
        objective: losses and predictions of the network.
        chunks: how many tasks are adapted at once.
    """

    network: nn.Module
    rule: OuterRule
    inner_optimizer: InnerOptimizer
    adapt: list[str] | None
    adapted: frozenset[str] | None
    train_schedule: InnerSchedule
    eval_schedule: InnerSchedule
    loss: Loss | None
    query_loss: Loss | None
    outer: OuterStep
    carried: State | None
    objective: Objective
    chunks: Chunks

    @property
    def execution(self) -> Execution:
        """The way it is computed; another one takes effect at the next use."""
        return self._execution

    @execution.setter
    def execution(self, execution: Execution) -> None:
        if execution.cuda_graph and self.outer.skips:
            raise ValueError(
                "model.execution.cuda_graph=True with model.outer.on_nonfinite='skip_task', which waits for the device "
                "in each meta-iteration: use on_nonfinite: raise, or leave cuda_graph out."
            )
        self._execution = execution
        self.chunks = Chunks(execution.tasks_per_chunk)
        self._take_network()

    def _take_network(self) -> None:
        """Prepare the network, at first and where another has been put in its place."""
        refuse_unusable(self.network)
        replaced = use_batch_statistics(self.network)
        if replaced:
            rank_zero_info(f"Batch norm uses the statistics of the batch at hand, always: {', '.join(replaced)}.")
        if left := other_norms(self.network):
            rank_zero_warn(
                f"{', '.join(left)}: left as written, with running averages, which mean little between tasks and "
                f"forbid vectorising: use torch's own batch norm or fomal.models.BatchNorm, or "
                f"track_running_stats=False."
            )
        self.adapted = None if self.adapt is None else matching(self.network, self.adapt)
        if self.adapted is not None:
            self._restrict(self.adapted)
        how, losses = self.execution, [loss for loss in (self.loss, self.query_loss) if loss is not None]
        tracer = Tracer(self.network, how.traced, how.compiled, losses)
        self.objective = Objective(self.network, how.vectorize, tracer, self.loss, self.query_loss)

    def _restrict(self, adapted: frozenset[str]) -> None:
        """See `adapt`, and `OuterStep.parameters`."""
        others = [name for name, p in self.network.named_parameters() if p.requires_grad and name not in adapted]
        if self.outer.parameters == "adapted":
            for name in others:
                self.network.get_parameter(name).requires_grad_(False)
        elif others and not self.rule.needs_query:
            rank_zero_warn(
                f"{type(self.rule).__name__} is made of the inner loop's displacements, so the {len(others)} tensors "
                f"that adapt leaves out, from {others[0]} on, stay as they are initialised: use a rule with a query "
                f"set, e.g. QueryFOMAML, to learn them, or model.outer.parameters: adapted to say that this is meant."
            )

    def initialisation(self) -> Tree:
        """The trainable parameters of the network, cut off from autograd; 16-bit ones (bf16-true) as 32-bit."""
        trainable = tree.detach({name: p for name, p in self.network.named_parameters() if p.requires_grad})
        return {name: p.to(torch.promote_types(p.dtype, torch.float32)) for name, p in trainable.items()}

    def _initially_adapted(self) -> Tree:
        """The part of the initialisation that the inner loop adapts."""
        phi = self.initialisation()
        return {name: p for name, p in phi.items() if self.adapted is None or name in self.adapted}

    def begun_state(self) -> State:
        """The carried state, or one that is new, on the network's device."""
        state = self.inner_optimizer.init(self._initially_adapted()) if self.carried is None else self.carried
        device = next(self.network.parameters()).device
        return {part: tree.to_device(values, device) for part, values in state.items()}

    def inner_loop(self, episode: Episode, training: bool, state: State | None = None) -> InnerLoop:
        """The inner loops of `episode`, on the training or the evaluation schedule, from `state` or the carried one.

        Raises:
            ValueError: the tasks have unequal sizes, a rule lacks a query set, or the network does not fit.
        """
        if episode.is_padded:
            raise ValueError("the tasks of this episode may be of unequal size: take the groups of Episode.by_size().")
        if not self.objective.is_of(self.network, self.loss, self.query_loss):
            self._take_network()
        like = next(p for p in self.network.parameters() if p.is_floating_point())
        episode = episode.with_task_tensors()
        if training and self.rule.needs_query and not episode.query_examples:
            raise ValueError(f"{type(self.rule).__name__} needs a query set, but Episode.query_x has no examples.")
        schedule = self.train_schedule if training else self.eval_schedule
        inner = InnerLoop(
            objective=self.objective.reduced_by(schedule.reduction),
            optimizer=self.inner_optimizer,
            state=self.begun_state() if state is None else state,
            indices=self._minibatch_indices(episode, training),
            episode=episode.floating(like.dtype),
            adapted=self.adapted,
        )
        self._check_network(inner, second_order=training and self.rule.differentiates)
        return inner

    def _minibatch_indices(self, episode: Episode, training: bool) -> MinibatchIndices:
        examples = episode.support_examples
        schedule = self.train_schedule if training else self.eval_schedule
        steps, batch, replacement = schedule.steps, schedule.batch_size, schedule.replacement
        stream = (episode.seed, episode.split, episode.number)
        if not training or self.rule.tail_shots is None:
            return minibatch_indices(*stream, examples, steps, batch, replacement)
        head, tail = separate_tail(examples, episode.blocks, self.rule.tail_shots, episode.number.device)
        indices = minibatch_indices(*stream, len(head), steps - 1, batch, replacement)
        return (*(head[index] for index in indices), tail.expand(episode.tasks, -1))

    @torch.no_grad()
    def _check_network(self, inner: InnerLoop, second_order: bool) -> None:
        """At the first use: refuse a network that does not fit the data, and settle how to run over tasks."""
        with_query = self.query_loss is not None and bool(inner.episode.query_examples)
        if self.objective.is_settled(second_order, with_query):
            return
        if inner.episode.number.device.type != "cpu":
            inner.episode.to("cpu").check()  # here there may be a wait
        episode = inner.episode
        few = episode.select(slice(0, 2))
        x, y = few.support_x, few.support_y
        if inner.indices:
            x, y = (gather_examples(part, inner.indices[0][:2]) for part in (x, y))
        query = (few.query_x, few.query_y) if with_query else ()
        for part, some_x, some_y in self.objective.parts(x, y, *query):
            first_x, first_y = (map_leaves(lambda t: t[0], value) for value in (some_x, some_y))
            check_loss(part.loss_of(some_y), checked(self.network, some_y), first_x, first_y, episode.ways)
        if self.loss is None and looks_like_labels(map_leaves(lambda t: t.flatten(0, 1), few.support_y)):
            rank_zero_info(
                "The targets are several zeros and ones: their loss is the squared error; for labels that are there or "
                "not, model.loss: fomal.inner.BinaryCrossEntropy."
            )
        self.objective.settle(self.initialisation(), x, y, second_order, query)
