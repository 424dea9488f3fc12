"""The lines in which the command line answers mistakes."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class UsageError(Exception):
    """A mistake in the command line or in a config file; its text is one line for the user."""


def did_you_mean(name: str, known: Iterable[str], prefix: str = "") -> str:
    """Text for the end of a message: the names nearest to `name`, by their whole or by their last segment.

    Args:
        name: what the user wrote.
        known: what there is.
        prefix: written before each suggestion, e.g. the dashes of an option.
    """
    leaves: dict[str, list[str]] = {}
    for candidate in sorted(set(known)):
        leaves.setdefault(candidate.split(".")[-1], []).append(candidate)
    leaf = name.split(".")[-1]
    if leaf in leaves:
        near = leaves[leaf]
    else:
        near = get_close_matches(name, [c for same in leaves.values() for c in same], n=3, cutoff=0.75)
        near += [c for other in leaves if other.lower().startswith(leaf.lower()) for c in leaves[other]]
        near += [c for other in get_close_matches(leaf, leaves, n=3, cutoff=0.65) for c in leaves[other]]
    suggestions = [prefix + candidate for candidate in dict.fromkeys(near)][:3]
    return f" - did you mean {' or '.join(suggestions)}?" if near else ""
