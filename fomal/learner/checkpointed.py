"""The checkpoints of a learner: what they have beside Lightning's part, and taking it over."""

from __future__ import annotations

import importlib
from abc import abstractmethod
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from fomal.inner.loss import kinds, refuse_missing
from fomal.learner.adapting import Adapting
from fomal.learner.preflight import total_steps
from fomal.learner.restoring import check_carried, check_module, check_outer, misfits, take_dtypes, take_state
from fomal.learner.settings import GROUPS
from fomal.learner.watch import refuse_nonfinite_state, refuse_nonfinite_weights
from fomal.run.provenance import commits, versions
from fomal.run.schema import CHECKPOINT_FORMAT, check_checkpoint
from fomal.run.trust import check_states

OUTER_KEPT = ("final", "clip_val", "clip_algorithm", "parameters", "on_nonfinite")
"""Of an outer step, what a checkpoint keeps: all in plain values."""

REPLICAS_GIVEN = "the checkpoint is of replicas: give that of one, replica_0/checkpoints/last.ckpt, say."


class Checkpointed(Adapting):
    """A learner that is saved and restored; its settings are those of `MetaLearner`."""

    inner_state: str
    config: dict[str, Any]
    skipped_tasks: int

    @abstractmethod
    def _outer(self, parameters: Iterable[nn.Parameter]) -> tuple[Optimizer, LRScheduler]:
        """The outer optimiser of parameters, and its schedule."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what `fomal test --ckpt_path` and an exact resume need: configuration and carried state.

        Raises:
            FloatingPointError: weights, outer optimiser or carried state are not finite; no file is touched then.
        """
        refuse_nonfinite_weights(self.network, f"meta-iteration {self.global_step}")
        refuse_nonfinite_state(checkpoint, self.carried)
        checkpoint["fomal"] = self.own_part()

    def own_part(self) -> dict[str, Any]:
        """The part of a checkpoint under "fomal"."""
        return {
            "format": CHECKPOINT_FORMAT,
            "config": self.config,
            "carried": self.carried,
            "max_steps": total_steps(self.trainer),
            "skipped_tasks": self.skipped_tasks,
            "settings": self._kept() | kinds(loss=self.loss, query_loss=self.query_loss),
            "versions": versions(),
            "commits": commits(),
        }

    def _kept(self) -> dict[str, Any]:
        """The settings in plain values that results depend on: a checkpoint has them, also where it has no config."""
        outer = {name: getattr(self.outer, name) for name in OUTER_KEPT}
        groups = {"train": asdict(self.train_schedule), "eval": asdict(self.eval_schedule), "outer": outer}
        return {"inner_state": self.inner_state, "adapt": self.adapt, **groups}

    @classmethod
    def load_from_checkpoint(  # type: ignore[override] # trust instead of hparams_file
        cls,
        checkpoint_path: str | Path,
        map_location: torch.device | str | None = None,
        *,
        trust: Collection[str] | None = None,
        **parts: Any,
    ) -> Self:
        """The learner of a checkpoint, with its weights and carried state, ready to be tested or to predict.

        One of `fomal fit` says how it is made. One of a learner made in Python has its settings, but no objects: give
        at least `network`, `rule` and `inner_optimizer`, and whatever else should differ; `outer` as a whole.

        Args:
            checkpoint_path: a file, or the folder of a run.
            map_location: the device to put the learner on.
            trust: names, or packages, that the checkpoint's configuration may use beside fomal's and torch's.
            parts: arguments of the constructor.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is no checkpoint of one learner, or does not say how to make it.
            FloatingPointError: its weights are not finite.
        """
        # By name, since building from a configuration is above the learner; nothing else here needs it.
        reader = importlib.import_module("fomal.learner.build")
        checkpoint = reader.read_checkpoint(checkpoint_path)
        saved = checkpoint["fomal"]
        if "replicas" in saved:
            raise ValueError(REPLICAS_GIVEN)
        if parts:
            missing = [name for name in ("network", "rule", "inner_optimizer") if name not in parts]
            if missing:
                raise ValueError(f"{checkpoint_path}: give load_from_checkpoint {' and '.join(missing)} too.")
            refuse_missing(saved.get("settings", {}), parts, checkpoint_path)
            learner = cls(**{**_settings(saved.get("settings", {})), **parts})
        elif saved["config"]:
            learner, _ = reader.build(saved["config"], trust, str(checkpoint_path), checkpoint)
            learner.config = saved["config"]
        else:
            raise ValueError(
                f"{checkpoint_path} is of a learner that was made in Python, so it does not say of what: use "
                f"load_from_checkpoint({str(checkpoint_path)!r}, network=..., rule=..., inner_optimizer=...)."
            )
        learner.take_over(checkpoint, str(checkpoint_path))
        learner.load_state_dict(checkpoint["state_dict"])
        refuse_nonfinite_weights(learner.network, str(checkpoint_path))
        return learner.eval() if map_location is None else learner.eval().to(map_location)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """See `take_over`."""
        self.take_over(checkpoint, "ckpt_path" if self._trainer is None else f"ckpt_path={self.trainer.ckpt_path}")

    def take_over(self, checkpoint: dict[str, Any], source: str, has_moved: bool = True) -> None:
        """Take over the carried state; refuse a changed `max_steps` where the schedule hangs on it.

        Args:
            checkpoint: the content.
            source: its file, for messages.
            has_moved: whether its meta-iterations, if there were any, have changed the weights.

        Raises:
            ValueError: it does not fit, naming file, entry and remedy.
        """
        check_states(checkpoint.get("callbacks"))
        check_checkpoint(checkpoint, source)
        saved = checkpoint["fomal"]
        if "replicas" in saved:
            raise ValueError(REPLICAS_GIVEN)
        resuming = self._trainer is not None and self.trainer.state.fn == "fit"
        if resuming and self.outer.schedule is None and self.outer.final != 1:
            before, now = saved["max_steps"], total_steps(self.trainer)
            if before != now:
                raise ValueError(
                    f"trainer.max_steps={now}, but the checkpoint's run has {before}, at which its linear outer "
                    f"schedule ends: use {before}, or give model.outer.schedule explicitly in a new run."
                )
        with misfits(source):
            check_module(self, checkpoint)
            self.check_state(checkpoint, resuming, has_moved)
        self._take_precision(checkpoint["state_dict"])
        self.carried = take_state(saved["carried"], self.inner_optimizer, self._initially_adapted())
        self.skipped_tasks = saved.get("skipped_tasks", 0)

    def _take_precision(self, weights: Mapping[str, Any]) -> None:
        """Convert the network before weights are loaded: as the trainer will do after that, or to the weights' dtypes.

        Else weights of 64 bits would go through 32.
        """
        if self._trainer is not None:
            self.trainer.precision_plugin.convert_module(self)
        else:
            take_dtypes(self.network, {name.removeprefix("network."): t for name, t in weights.items()})

    def check_state(self, checkpoint: Mapping[str, Any], resuming: bool, has_moved: bool = True) -> None:
        """Raise `Mismatch` where the inner or, to go on from it, the outer state of a checkpoint does not fit."""
        learnt = {name: p for name, p in self.network.named_parameters() if p.requires_grad}
        adapted = {
            name: checkpoint["state_dict"].get(f"network.{name}", p.detach())
            for name, p in learnt.items()
            if self.adapted is None or name in self.adapted
        }
        saved = checkpoint["fomal"]
        # With skipped tasks, it may be that none has counted yet.
        has_moved = has_moved and checkpoint["global_step"] > 0 and not saved.get("skipped_tasks")
        carries = "reset" not in (self.inner_state, saved.get("settings", {}).get("inner_state"))
        check_carried(saved["carried"], self.inner_optimizer, adapted, has_moved and carries)
        if resuming:
            check_outer(self._outer, learnt, checkpoint, adapted if has_moved else ())


def _settings(kept: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a learner from those that a checkpoint has kept, see `Checkpointed._kept`."""
    made = {name: kept[name] for name in ("inner_state", "adapt") if name in kept}
    for name, default in GROUPS.items():
        known = {field.name for field in fields(default)}
        made[name] = replace(default, **{key: value for key, value in kept.get(name, {}).items() if key in known})
    return made
