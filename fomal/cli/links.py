"""Settings that follow from others, so that they need not be given twice."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml
from jsonargparse import ArgumentParser, Namespace

from fomal.cli.errors import UsageError
from fomal.cli.given import short_key

SEED = ("seed_everything", "data.init_args.seed")
WAYS = ("data.init_args.ways", "model.network.init_args.ways")


def stream_seed(seed: bool | int) -> int:
    """The seed of the episode stream; a random one (true) is drawn after parsing and put in its place then."""
    return int(seed) if not isinstance(seed, bool) else 0


def link(parser: ArgumentParser) -> None:
    """Link seed and ways; a class without one of the two parameters is left as it is."""
    parser.link_arguments(*SEED, compute_fn=stream_seed)
    parser.link_arguments(*WAYS)


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
