"""Settings of a learner in part, for tests that change a few of some defaults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import is_dataclass, replace
from inspect import signature
from typing import Any

from fomal.learner.meta_learner import MetaLearner

DEFAULTS = {name: parameter.default for name, parameter in signature(MetaLearner.__init__).parameters.items()}


def merged(*parts: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of which later ones go first; those of a group, as `{"train": {"steps": 2}}`, one by one."""
    found: dict[str, Any] = {}
    for name, value in (item for part in parts for item in part.items()):
        found[name] = {**found.get(name, {}), **value} if isinstance(value, dict) else value
    return found


def grouped(*parts: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a `MetaLearner` from settings that may have a mapping in the place of a group."""
    made = merged(*parts)
    groups = {name for name, value in made.items() if is_dataclass(DEFAULTS.get(name)) and isinstance(value, dict)}
    return {name: replace(DEFAULTS[name], **value) if name in groups else value for name, value in made.items()}
