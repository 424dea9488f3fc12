"""Settings that follow from others must not be given another value."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml
from jsonargparse import Namespace

from fomal.build import SEED, WAYS
from fomal.cli.errors import UsageError
from fomal.cli.given import short_key


def refuse_contradictions(config: Namespace, given: Mapping[str, Any]) -> None:
    """Raise UsageError where a linked setting was given another value than its source: it would be ignored."""
    for source, target in (SEED, WAYS):
        key = short_key(target)
        if key in given and source in config and target in config:
            expected, value = config[source], given[key]
            value = yaml.safe_load(value) if isinstance(value, str) else value
            if value != expected or isinstance(value, bool) != isinstance(expected, bool):
                raise UsageError(
                    f"{key}={value} was given, but it follows {short_key(source)}={expected}: "
                    f"leave it out, or change {short_key(source)}."
                )
