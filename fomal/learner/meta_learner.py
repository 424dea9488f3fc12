"""The meta-learner: a LightningModule around a network, an outer rule and an inner optimiser."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from fomal.engine.cuda_graph import CAPTURES, Capture, Captured
from fomal.evaluation.means import TaskMean
from fomal.evaluation.metrics import Metric, check_metrics
from fomal.inner.loop import InnerLoop
from fomal.inner.loss import Loss, refuse_torchs
from fomal.inner.optimizer import InnerOptimizer, State
from fomal.learner.checkpointed import Checkpointed
from fomal.learner.evaluating import Evaluating
from fomal.learner.guarded import Guarded
from fomal.learner.preflight import (
    check_monitors,
    check_trainer,
    tell_of_validation,
    total_steps,
)
from fomal.learner.settings import (
    EVAL,
    EXECUTION,
    GROUPS,
    OUTER,
    TRAIN,
    EvalSchedule,
    Execution,
    InnerSchedule,
    OuterStep,
)
from fomal.learner.watch import Watch, refuse_nonfinite_weights
from fomal.outer.meta_gradient import (
    MetaGradient,
    bad_tasks,
    gradient_in_series,
    mean_over_parts,
    mean_over_processes,
    meta_gradient,
    varied,
)
from fomal.outer.rule import OuterRule
from fomal.run.moved import RefusesMoved
from fomal.tasks.datamodule import EpisodeDataModule
from fomal.tasks.episode import Episode, Numbers, refuse_others
from fomal.utils.checks import of_type, one_of
from fomal.utils.fingerprint import settings
from fomal.utils.output import rank_zero_warn
from fomal.utils.processes import refuse_disagreement
from fomal.utils.pytree import leaves
from fomal.utils.tree import Tree

SKIPPED_AT_MOST = 100
"""Meta-batches without a finite task, one after the other, that end a run. The weights stay as they are meanwhile; even
where nine of ten tasks are not finite and a meta-batch has one, so many in a row come once in 37,000 times."""


class MetaLearner(RefusesMoved, Evaluating, Checkpointed, Guarded):
    """Learns an initialisation of `network` from which a few inner steps solve a new task.

    Optimisation is manual: in each meta-iteration `rule` adapts a meta-batch of tasks with `inner_optimizer` and
    returns an outer gradient, which `outer.optimizer` descends.

    Args:
        network: any module from inputs (B, *input) to outputs as the loss has them, e.g. (B, ways) or (B, *target).
        rule: outer rule, e.g. `fomal.outer.Reptile`.
        inner_optimizer: inner optimiser, e.g. `fomal.inner.Adam`.
        inner_state: of the inner optimiser: "carried" from meta-batch to meta-batch, where all tasks of one begin with
            it and their states are averaged; "in_series" also from task to task within one, which then run one after
            the other, as in the released code; or "reset" for each task.
        adapt: which parameters the inner loop adapts, as patterns of their names, e.g. ["head.*"] or, with an
            exclamation mark for exceptions, ["*", "!*.norm.*"]; null: all.
        train: inner steps on training tasks.
        eval: inner steps on validation, test and prediction tasks, and those that are reported.
        loss: of a task's examples, e.g. `fomal.inner.Huber`; null: from the data, cross-entropy of int64 labels and
            squared error of floating-point targets.
        query_loss: of the query sets, in outer rules and in evaluations, where it is another one.
        outer: what becomes of the outer gradient.
        execution: how it is computed.
        metrics: what evaluations measure, e.g. [fomal.evaluation.Accuracy()]; null: what the loss says, accuracy of
            labels and the loss of targets unless it is one's own.

    Attributes:
        train_schedule: as `train`, a name that modules have for something else; another one may take its place, e.g.
            `learner.train_schedule = dataclasses.replace(learner.train_schedule, steps=8)`.
        eval_schedule: likewise, as `eval`.
        outer: likewise, before a training.
        execution: likewise.

    Raises:
        ValueError: for settings that do not fit together, naming argument and remedy.
    """

    def __init__(
        self,
        network: nn.Module,
        rule: OuterRule,
        inner_optimizer: InnerOptimizer,
        inner_state: Literal["carried", "in_series", "reset"] = "carried",
        adapt: list[str] | None = None,
        train: InnerSchedule = TRAIN,
        eval: EvalSchedule = EVAL,
        loss: Loss | None = None,
        query_loss: Loss | None = None,
        outer: OuterStep = OUTER,
        execution: Execution = EXECUTION,
        metrics: list[Metric] | None = None,
    ) -> None:
        super().__init__()
        one_of(("carried", "in_series", "reset"), inner_state=inner_state)
        for name, group in {"train": train, "eval": eval, "outer": outer, "execution": execution}.items():
            kind = type(GROUPS[name])
            of_type(InnerSchedule if kind is EvalSchedule else kind, **{name: group})
        if metrics is not None:
            check_metrics(metrics)
        rule.check(train.steps, inner_optimizer)
        self.automatic_optimization = False
        self.network = network
        self.rule = rule
        self.inner_optimizer = inner_optimizer
        self.inner_state = inner_state
        self.adapt = adapt
        self.train_schedule: InnerSchedule = train
        self.eval_schedule: InnerSchedule = eval
        refuse_torchs(loss=loss, query_loss=query_loss)
        self.loss, self.query_loss = loss, query_loss
        self.outer = outer
        self.execution = execution
        self.metrics = metrics
        self.results = {}
        self._tally = None
        self.captured: Captured | None = None
        self.carried: State | None = None
        self.skipped_tasks = 0
        self._skipped_in_a_row = 0
        self.config: dict[str, Any] = {}
        self.watch = Watch()
        # Nothing is left for torchmetrics to reduce: training losses are means over processes already, and the
        # figures of an evaluation are reduced all at once.
        self.train_losses = TaskMean(2, sync_on_compute=False)  # on the first and on the last mini-batch
        self.train_losses.persistent(True)  # so that a resumed run logs what an uninterrupted one does

    def forward(self, x: Tensor) -> Tensor:
        """The network's outputs for inputs (B, *input), at the initialisation; `evaluate` adapts to a task first."""
        return self.network(x)  # type: ignore[no-any-return]

    # -- training

    def gradient_of(self, batch: Episode | Numbers, phi: Tree, state: State) -> MetaGradient:
        """The outer gradient of this process's meta-batch: a function of initialisation and inner state only.

        Args:
            batch: the tasks, or their numbers, from which the run's datamodule samples them.
            phi: the initialisation.
            state: the inner optimiser's.
        """
        loops = self._training_loops(batch, state)
        if self.inner_state == "in_series":
            return gradient_in_series(self.rule, loops, phi, self.outer.skips)
        return mean_over_parts(
            (meta_gradient(self.rule, inner, phi, self.outer.skips, self.chunks), inner.tasks / len(batch.number))
            for inner in loops
        )

    def _training_loops(self, batch: Episode | Numbers, state: State) -> list[InnerLoop]:
        """The inner loops of a meta-batch, those of tasks of equal size together."""
        if isinstance(batch, Numbers):
            data = getattr(self.trainer, "datamodule", None)
            assert isinstance(data, EpisodeDataModule)  # no other gives numbers
            batch = data.sample(batch)
        if batch.support_size is not None and self.rule.tail_shots is not None and not batch.is_regression:
            raise ValueError(
                f"tail_shots={self.rule.tail_shots} keeps examples of each class, but Episode.support_size says that "
                f"tasks have unequal ones: use tail_shots: null."
            )
        return [self.inner_loop(group, training=True, state=state) for _, group in batch.by_size()]

    def capturing(self, function: Callable[..., MetaGradient], capture: Capture) -> Captured:
        """Capture `gradient_of`, or a function like it; that the values are finite is then found on the device too."""

        def known_finite(batch: Episode | Numbers, phi: Tree, state: State) -> MetaGradient:
            found = function(batch, phi, state)
            return found._replace(finite=found.is_finite())

        name = f"Meta-iterations of {type(self.network).__name__}"
        return Captured(known_finite, varied, self.network, name, self._fixed, capture)

    def _fixed(self) -> Any:
        """The settings that the result of `gradient_of` depends on beside the network."""
        inner = self.train_schedule, settings(self.inner_optimizer)
        return inner, settings(self.rule), self.objective.losses_used(), self.adapted

    def training_step(self, batch: Episode | Numbers, batch_idx: int) -> None:
        """One meta-iteration: the outer optimiser descends what the rule makes of a meta-batch of adapted tasks."""
        refuse_others(batch)
        # Dropout and the like draw from torch's own generator; this makes them a function of seed and position too.
        self.seed_for(batch.seed + self.global_step * self.trainer.world_size + self.global_rank)
        phi, state = self.initialisation(), self.begun_state()
        found = (self.captured or self.gradient_of)(batch, phi, state)
        found, flags = mean_over_processes(found, self.watch.flags(self.device))
        self.watch.look(flags, found.is_finite(), self.global_step + 1, lambda: self._bad_episodes(batch, phi, state))
        counts = self._counts(found)
        self.adopt(found if counts else None)
        self._optimizer().step()
        self._scheduler().step()
        if figures := self.training_figures(found.losses[None] if counts else found.losses[None][:0]):
            self.log_dict(figures | {"outer_lr": self._optimizer().param_groups[0]["lr"]})

    def _bad_episodes(self, batch: Episode | Numbers, phi: Tree, state: State) -> list[int]:
        """The episodes of this process that are not finite, unless it is the weights or the data."""
        refuse_nonfinite_weights(self.network, f"meta-iteration {self.global_step}")
        loops = self._training_loops(batch, state)
        for inner in loops:
            if found := inner.episode.nonfinite():
                raise FloatingPointError(
                    f"meta-iteration {self.global_step + 1}: the {found} is not finite: mend the data, or leave such "
                    f"tasks out with model.outer.on_nonfinite: skip_task."
                )
        bad = [inner.episode.number[bad_tasks(self.rule, inner, phi)] for inner in loops]
        return sorted(torch.cat(bad).tolist())

    def _counts(self, found: MetaGradient) -> bool:
        """Tell whether a task of the meta-batch is finite; raises FloatingPointError where none is again and again."""
        if not self.outer.skips:
            return True
        self.skipped_tasks += int(found.skipped)
        if found.weight:
            self._skipped_in_a_row = 0
            return True
        self._skipped_in_a_row += 1
        step = self.global_step + 1
        if self._skipped_in_a_row == 1:
            refuse_nonfinite_weights(self.network, f"meta-iteration {self.global_step}")
            rank_zero_warn(
                f"meta-iteration {step}: no task of its meta-batch is finite, so the weights stay as they are; "
                f"{SKIPPED_AT_MOST} such meta-iterations in a row end the run."
            )
        if self._skipped_in_a_row == SKIPPED_AT_MOST:
            raise FloatingPointError(
                f"meta-iteration {step}: no task of the last {SKIPPED_AT_MOST} meta-batches is finite, and the weights "
                f"have not changed since: lower model.inner_optimizer.lr, or look at the data."
            )
        return False

    def adopt(self, found: MetaGradient | None) -> None:
        """Give the outer gradient to the parameters, and go on from its inner state; None: no task counts."""
        if found is not None and self.inner_state != "reset" and found.state:
            self.carried = found.state
        for name, parameter in self.network.named_parameters():
            gradient = None if found is None else found.gradient.get(name)
            parameter.grad = None if gradient is None else gradient.to(parameter.dtype)
        self.outer.clip(self.network.parameters())

    def seed_for(self, seed: int) -> None:
        """As `torch.manual_seed`, which asks for devices that are not used, too, and takes longer than a small step."""
        torch.default_generator.manual_seed(seed)
        if self.device.type != "cpu":
            torch.get_device_module(self.device).manual_seed(seed)

    def _optimizer(self) -> LightningOptimizer:
        optimizer = self.optimizers()
        assert isinstance(optimizer, LightningOptimizer)  # configure_optimizers returns one
        return optimizer

    def _scheduler(self) -> LRScheduler:
        scheduler = self.lr_schedulers()
        assert isinstance(scheduler, LRScheduler)  # configure_optimizers returns one
        return scheduler

    def training_figures(self, losses: Tensor) -> dict[str, Any]:
        """The figures that are due to be logged after a meta-iteration with these losses (n, 2); nothing between."""
        self.train_losses.update(losses)
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined] # set by a helper
        if every == 0 or self.global_step % every:
            return {}
        (first, last), _ = self.train_losses.compute()
        self.train_losses.reset()
        figures = {
            "train/loss_first_step": first,
            "train/loss_last_step": last,
            "step": float(self.global_step),  # the logger's x axis, in meta-iterations
        }
        if self.outer.skips:
            figures["train/skipped_tasks"] = float(self.skipped_tasks)
        return figures

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """The outer optimiser over the trainable parameters, and its schedule."""
        optimizer, schedule = self._outer(p for p in self.network.parameters() if p.requires_grad)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _outer(self, parameters: Iterable[nn.Parameter]) -> tuple[Optimizer, LRScheduler]:
        """See `configure_optimizers`."""
        return self.outer.build(parameters, total_steps(self.trainer))

    # -- checks before work starts

    def setup(self, stage: str) -> None:
        """Refuse, before any work, what cannot run: precision, data, or a network that does not fit the data."""
        if self.trainer.ckpt_path is None:
            self.refuse_nonfinite()
        self.check_with(getattr(self.trainer, "datamodule", None), stage)

    def check_with(self, data: object, stage: str) -> None:
        """See `setup`; `data` is what the trainer has as datamodule."""
        check_trainer(self.trainer)
        same: dict[str, Any] = {"model": self.config.get("model"), "trainer.max_steps": self.trainer.max_steps}
        if stage == "fit":
            self.rule.check(self.train_schedule.steps, self.inner_optimizer)
        if isinstance(data, EpisodeDataModule):
            split = {"fit": "train", "validate": "val"}.get(stage, "test")
            if stage == "fit" and self.rule.needs_query and not data.train_query_shots:
                raise ValueError(
                    f"{type(self.rule).__name__} needs a query set, but data.train_query_shots=0: "
                    f"set data.train_query_shots to 1 or more."
                )
            if stage == "fit":
                tell_of_validation(self.trainer)
                data.check_processes(self.trainer.world_size)
            data.check_memory(["train", "val"] if stage == "fit" else [split])
            # The first use of the network, on two tasks: what does not fit is found here.
            episode = data.episodes(split, torch.arange(2)).check()
            sums = sum(t.double().sum().item() for t in leaves(episode.support_x))
            same |= {"the seed of the data": data.seed, "the first episodes": sums}
            self.objective.unsettle()
            for _, group in data.on_after_batch_transfer(episode, 0).by_size()[:1]:
                self.inner_loop(group, training=stage == "fit")
            self._check_figures(data, stage, split)
        refuse_disagreement(same)

    def _check_figures(self, data: EpisodeDataModule, stage: str, split: str) -> None:
        """Refuse metrics that do not fit the data, and callbacks that keep the worst by one."""
        if stage == "fit":
            if not self.trainer.limit_val_batches:
                return
            split = "val"
        episode = data.on_after_batch_transfer(data.episodes(split, torch.arange(1)).check(), 0)
        if episode.query_examples:
            check_monitors(self.trainer, self.try_metrics(episode))

    def on_train_start(self) -> None:
        """Refuse processes that go on from different checkpoints, and weights that are not finite."""
        refuse_disagreement({"the meta-iteration they go on from": self.global_step})
        self._skipped_in_a_row = 0
        self.refuse_nonfinite()
        self._settle_capture()

    def _settle_capture(self) -> None:
        """See `Execution.cuda_graph`."""
        wanted = self.execution.cuda_graph
        capture = CAPTURES.get(self.device.type) if wanted else None
        if wanted and capture is None:
            rank_zero_warn(
                f"model.execution.cuda_graph=True has no effect on {self.device.type}: meta-iterations run as they are."
            )
        self.captured = None if capture is None else self.capturing(self.gradient_of, capture)
        data = getattr(self.trainer, "datamodule", None)
        if isinstance(data, EpisodeDataModule):
            data.keeps_numbers = self.captured is not None

    def refuse_nonfinite(self) -> None:
        """Raise FloatingPointError, naming the parameter, where a weight is infinite or NaN; forget earlier tasks."""
        self._tally = None
        trained = f" after meta-iteration {step}" if (step := self.global_step) else ""
        refuse_nonfinite_weights(self.network, f"{getattr(self.trainer.state.fn, 'value', '')}{trained}")

    def on_train_end(self) -> None:
        """Free what was captured."""
        if self.captured is not None:
            self.captured.forget()
