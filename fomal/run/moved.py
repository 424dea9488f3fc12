"""Settings that had other names in earlier versions: one's own are refused, those that a file has stored are read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Self

MOVED = {
    "model.inner_steps": ("model.train.steps",),
    "model.inner_batch_size": ("model.train.batch_size",),
    "model.inner_replacement": ("model.train.replacement", "model.eval.replacement"),
    "model.eval_inner_steps": ("model.eval.steps",),
    "model.eval_inner_batch_size": ("model.eval.batch_size",),
    "model.outer_optimizer": ("model.outer.optimizer",),
    "model.outer_schedule": ("model.outer.schedule",),
    "model.outer_final": ("model.outer.final",),
    "model.outer_clip_val": ("model.outer.clip_val",),
    "model.outer_clip_algorithm": ("model.outer.clip_algorithm",),
    "model.outer_parameters": ("model.outer.parameters",),
    "model.on_nonfinite": ("model.outer.on_nonfinite",),
    "model.vectorize": ("model.execution.vectorize",),
    "model.recorded": ("model.execution.traced",),
    "model.compiled": ("model.execution.compiled",),
    "model.cuda_graph": ("model.execution.cuda_graph",),
    "model.tasks_per_chunk": ("model.execution.tasks_per_chunk",),
}
"""Short keys of earlier versions, and those that have their values now."""

REMOVED = {"model.meta_iterations_per_step": "leave it out, since results never depended on it"}
"""Short keys that are gone, and what to do instead."""


SCHEDULES = {"train": "train_schedule", "eval": "eval_schedule"}
"""Arguments of a learner that cannot be attributes of a module, and the attributes that they become."""


def refusal(keys: Iterable[str]) -> str:
    """The text that refuses those of some short keys that have moved or are gone; empty where there is none."""
    found = dict.fromkeys(old for key in keys if (old := _earlier(key)))
    return "; ".join(
        f"{old} is now {' and '.join(MOVED[old])}" if old in MOVED else f"{old} is gone: {REMOVED[old]}"
        for old in found
    )


class RefusesMoved:
    """The base of a learner, whose arguments and attributes of earlier versions are refused by their names."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Raise TypeError for an argument that has moved or is gone."""
        if moved := refusal(f"model.{name}" for name in kwargs):
            raise TypeError(f"{moved}.")
        return super().__new__(cls)

    def __setattr__(self, name: str, value: Any) -> None:
        """Raise AttributeError for an attribute that has moved or is gone, or that modules have for a method."""
        if name in SCHEDULES:
            raise AttributeError(f"{name} is a method of modules: set {SCHEDULES[name]} instead.")
        if moved := refusal([f"model.{name}"]):
            raise AttributeError(f"{moved}.")
        super().__setattr__(name, value)


def current(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration that a file has stored, with the keys of today; parts that have not moved are not copied."""
    made = dict(config)
    for old in (*MOVED, *REMOVED):
        section, name = old.split(".")
        if not isinstance(made.get(section), dict) or name not in made[section]:
            continue
        made[section] = dict(made[section])
        value = made[section].pop(name)
        for new in MOVED.get(old, ()):
            _put(made, new.split("."), value)
    if isinstance(made.get("replicas"), list):
        made["replicas"] = [_renamed(changes) for changes in made["replicas"]]
    return made


def _earlier(key: str) -> str | None:
    """The moved or removed key that a short key is, or lies within."""
    return next((old for old in (*MOVED, *REMOVED) if key == old or key.startswith(f"{old}.")), None)


def _put(config: dict[str, Any], path: list[str], value: Any) -> None:
    """Set a value in nested mappings, which are copied on the way; one in the place of a mapping stays."""
    *sections, name = path
    for section in sections:
        inside = config.get(section, {})
        if not isinstance(inside, dict):
            return
        config[section] = config = dict(inside)
    config[name] = value


def _renamed(changes: Any) -> Any:
    """The settings of a replica, whose keys are names with dots."""
    if not isinstance(changes, dict):
        return changes
    found = {key: _earlier(key) if isinstance(key, str) else None for key in changes}
    return {
        MOVED[old][0] + key[len(old) :] if (old := found[key]) in MOVED else key: value
        for key, value in changes.items()
        if found[key] not in REMOVED
    }
