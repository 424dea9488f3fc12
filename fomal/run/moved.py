"""Settings that had other names in earlier versions: one's own are refused, those that a file has stored are read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

MOVED: dict[str, tuple[str, ...]] = {}
"""Short keys of earlier versions, and those that have their values now."""

REMOVED = {"model.meta_iterations_per_step": "leave it out, since results never depended on it"}
"""Short keys that are gone, and what to do instead."""


def refusal(keys: Iterable[str]) -> str:
    """The text that refuses those of some short keys that have moved or are gone; empty where there is none."""
    found = dict.fromkeys(old for key in keys if (old := _earlier(key)))
    return "; ".join(
        f"{old} is now {' and '.join(MOVED[old])}: change its name"
        if old in MOVED
        else f"{old} is gone: {REMOVED[old]}"
        for old in found
    )


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
