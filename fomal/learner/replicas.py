"""Several runs of one configuration side by side in one program: other seeds, or other step sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn

from fomal.learner.alike import check_alike
from fomal.learner.guarded import Guarded
from fomal.learner.meta_learner import MetaLearner
from fomal.learner.restoring import check_module, misfits
from fomal.learner.side_by_side import SideBySide, of_run, optimizer_of_all
from fomal.learner.watch import LOOK_EVERY, Watch, nonfinite, refuse_nonfinite_state, refuse_nonfinite_weights
from fomal.outer.meta_gradient import MetaGradient, mean_over_processes, meta_gradient
from fomal.run.schema import CHECKPOINT_FORMAT, check_checkpoint
from fomal.run.trust import check_states
from fomal.tasks.episode import Episode
from fomal.tasks.replicated import ReplicatedDataModule
from fomal.utils.output import rank_zero_warn
from fomal.utils.processes import refuse_disagreement


class Replicas(Guarded):
    """R learners trained at once: the inner loops of all their tasks are one, and data and launches are shared.

    Each is the run that it would be alone, up to rounding: with its own tasks (`ReplicatedDataModule`), carried state,
    outer optimiser and schedule. Networks that draw random numbers (dropout) draw others. What is logged here are means
    over the replicas; `figures` has each one's own. A replica whose values become infinite or NaN stops, with one line,
    and the others go on.

    Args:
        learners: two or more, with one architecture and one rule; seeds, and the step sizes of the inner and the outer
            optimisers, may differ. All parameters are learnt and adapted.

    Attributes:
        figures: for each replica what was logged last, to be written by a callback.
        stopped: for each replica that has stopped, after which meta-iteration.

    Raises:
        ValueError: for learners that do not fit together, or settings that replicas do not know.
    """

    def __init__(self, learners: Sequence[MetaLearner]) -> None:
        super().__init__()
        check_alike(learners)
        self.automatic_optimization = False
        first = learners[0]
        for learner in learners[1:]:
            learner.objective, learner.chunks = first.objective, first.chunks  # what is settled once holds for all
        self.learners = nn.ModuleList(learners)
        self.watch = Watch()
        self.config: dict[str, Any] = {}
        self.figures: list[dict[str, Any]] = [{} for _ in learners]
        self.stopped: dict[int, int] = {}
        self._finite = torch.ones(len(learners), dtype=torch.bool)
        self._per_task = optimizer_of_all([learner.inner_optimizer for learner in learners])

    def __iter__(self) -> Any:
        """The learners."""
        return iter(self.learners)

    def running(self) -> list[tuple[int, MetaLearner]]:
        """The learners that have not stopped, with their places."""
        return [(place, learner) for place, learner in enumerate(self) if place not in self.stopped]

    # -- training

    def training_step(self, batch: tuple[Episode, ...], batch_idx: int) -> None:
        """One meta-iteration of each replica."""
        learners = list(self)
        if any(episode.is_padded for episode in batch):
            raise ValueError("tasks of unequal size do not work with replicas yet: train runs one by one.")
        learners[0].seed_for(batch[0].seed + self.global_step * self.trainer.world_size + self.global_rank)
        loops = [learner.inner_loop(episode, training=True) for learner, episode in zip(learners, batch, strict=True)]
        inner = SideBySide.join(loops, self._per_task)
        starts = [learner.initialisation() for learner in learners]
        phi = {name: torch.stack([start[name] for start in starts]) for name in starts[0]}
        found = meta_gradient(learners[0].rule, inner, phi, False, learners[0].chunks)
        found, flags = mean_over_processes(found, self.watch.flags(self.device))
        self.watch.look(flags, torch.ones((), dtype=torch.bool, device=self.device), self.global_step + 1, list)
        self._look(found)
        optimizers: Any = self.optimizers()
        schedulers: Any = self.lr_schedulers()
        first = optimizers[0]
        for place, learner in enumerate(learners):
            learner.adopt(None if place in self.stopped else _part(found, place))
        for optimizer in optimizers[1:]:
            optimizer.optimizer.step()  # not counted by the trainer, whose steps are meta-iterations
        assert isinstance(first, LightningOptimizer)
        first.step()
        for scheduler in schedulers:
            scheduler.step()
        self._log_training(found.losses, [optimizer.param_groups[0]["lr"] for optimizer in optimizers])

    def _look(self, found: MetaGradient) -> None:
        """Stop the replicas whose values are not finite; on a GPU, which would have to be waited for, now and then."""
        finite = torch.stack([t.isfinite().flatten(1).all(1) for t in found.tensors()]).all(0)
        self._finite = self._finite.to(finite.device) & finite
        if finite.device.type == "cpu" or (self.global_step + 1) % LOOK_EVERY == 0:
            self.stop_nonfinite(self.global_step + 1)

    def stop_nonfinite(self, step: int) -> None:
        """Leave the replicas as they are that had a value which is not finite since the last look.

        Raises:
            FloatingPointError: none is left.
        """
        weights = [not nonfinite(learner.network.named_parameters()) for learner in self]
        for place, finite in enumerate(self._finite.tolist()):
            if (finite and weights[place]) or place in self.stopped:
                continue
            self.stopped[place] = step
            rank_zero_warn(
                f"replica {place} stops at meta-iteration {step}, where its loss, gradient, inner state or weights are "
                f"not finite; the others go on. Lower its step sizes."
            )
        if len(self.stopped) == len(self.learners):
            raise FloatingPointError(
                f"meta-iteration {step}: no replica is left whose values are finite: lower model.inner_optimizer.lr or "
                f"the outer step size."
            )

    def _log_training(self, losses: Tensor, rates: Sequence[float]) -> None:
        found = [learner.training_figures(own[None]) for learner, own in zip(self, losses, strict=True)]
        if found[0]:
            self._log_each([own | {"outer_lr": rate} for own, rate in zip(found, rates, strict=True)])

    def _log_each(self, figures: list[dict[str, Any]]) -> None:
        """Keep each replica's figures for its own log, and log their means."""
        # A number becomes what Lightning would make of it in the log of a run alone.
        self.figures = [{name: torch.as_tensor(value) for name, value in own.items()} for own in figures]
        running = [own for place, own in enumerate(self.figures) if place not in self.stopped]
        self.log_dict({name: torch.stack([own[name].double() for own in running]).mean() for name in running[0]})

    def configure_optimizers(self) -> Any:
        """Each learner's outer optimiser and schedule."""
        return [learner.configure_optimizers() for learner in self]

    # -- evaluation

    def validation_step(self, batch: tuple[Episode, ...], batch_idx: int) -> None:
        """Evaluate a batch of tasks of each replica."""
        for learner, episode in zip(self, batch, strict=True):
            learner.validation_step(episode, batch_idx)

    def test_step(self, batch: tuple[Episode, ...], batch_idx: int) -> None:
        """Evaluate a batch of tasks of each replica."""
        self.validation_step(batch, batch_idx)

    def predict_step(self, batch: tuple[Episode, ...], batch_idx: int) -> list[dict[str, Tensor]]:
        """For each replica the predictions for its batch of tasks."""
        return [learner.predict_step(episode, batch_idx) for learner, episode in zip(self, batch, strict=True)]

    def on_validation_epoch_end(self) -> None:
        """Log the validation figures."""
        step = {"step": float(self.global_step)}
        self._log_each([learner.evaluation_figures("val") | step for learner in self])

    def on_test_epoch_end(self) -> None:
        """Log the test figures."""
        self._log_each([learner.evaluation_figures("test") for learner in self])

    # -- checks before work starts, and checkpoints

    def setup(self, stage: str) -> None:
        """Refuse, before any work, what cannot run, for each learner by itself."""
        data = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, ReplicatedDataModule) or len(data.parts) != len(self.learners):
            raise ValueError(
                f"{len(self.learners)} replicas need tasks for each: give the trainer a ReplicatedDataModule with as "
                f"many seeds."
            )
        if self.trainer.ckpt_path is None:
            self.refuse_nonfinite()
        for learner in self:
            learner.trainer = self.trainer
        for place, learner in self.running():
            learner.check_with(data.parts[place], stage)

    def on_train_start(self) -> None:
        """Refuse processes that go on from different checkpoints."""
        refuse_disagreement({"the meta-iteration they go on from": self.global_step})
        self.refuse_nonfinite()

    def on_validation_start(self) -> None:
        """Refuse weights that are not finite, once training has not."""
        if self.trainer.state.fn != "fit":
            self.refuse_nonfinite()

    def refuse_nonfinite(self) -> None:
        """Raise FloatingPointError where a weight of a replica that has not stopped is infinite or NaN."""
        for place, learner in self.running():
            refuse_nonfinite_weights(learner.network, f"replica {place}")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what each replica's own checkpoint has.

        Raises:
            FloatingPointError: values of a replica that has not stopped are not finite; no file is touched then.
        """
        self.refuse_nonfinite()
        for place, learner in self.running():
            states = checkpoint.get("optimizer_states", [])[place : place + 1]
            refuse_nonfinite_state({**checkpoint, "optimizer_states": states}, learner.carried)
        checkpoint["fomal"] = {
            "format": CHECKPOINT_FORMAT,
            "config": self.config,
            "replicas": [learner.own_part() for learner in self],
            "stopped": self.stopped,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take over each replica's carried state."""
        check_states(checkpoint.get("callbacks"))
        source = f"ckpt_path={self.trainer.ckpt_path}"
        check_checkpoint(checkpoint, source)
        saved = checkpoint["fomal"].get("replicas")
        if saved is None or len(saved) != len(self.learners):
            found = "no replicas" if saved is None else f"{len(saved)} replicas"
            raise ValueError(f"{source} is a checkpoint of {found}, not of {len(self.learners)}.")
        with misfits(source):
            check_module(self, checkpoint)
        self.stopped = dict(checkpoint["fomal"]["stopped"])
        for place, learner in enumerate(self):
            learner.trainer = self.trainer
            learner.take_over(replica_checkpoint(checkpoint, place), source, place not in self.stopped)


def replica_checkpoint(checkpoint: Mapping[str, Any], place: int) -> dict[str, Any]:
    """The checkpoint that a replica would have as a run of its own, from that of all."""
    prefix = f"learners.{place}."
    weights = checkpoint["state_dict"].items()
    return {
        **checkpoint,
        "state_dict": {name.removeprefix(prefix): t for name, t in weights if name.startswith(prefix)},
        **{
            key: checkpoint[key][place : place + 1]
            for key in ("optimizer_states", "lr_schedulers")
            if key in checkpoint
        },
        "fomal": checkpoint["fomal"]["replicas"][place],
    }


def replica_folder(place: int) -> str:
    """The folder of a replica within that of the run."""
    return f"replica_{place}"


def _part(found: MetaGradient, place: int) -> MetaGradient:
    """What the tasks of one replica say."""
    return found._replace(
        gradient={name: t[place] for name, t in found.gradient.items()},
        state=of_run(found.state, place),
        losses=found.losses[place],
    )
