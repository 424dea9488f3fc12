"""Parameters of a network by name."""

from __future__ import annotations

from fnmatch import filter as matches

from torch import nn


def matching(network: nn.Module, patterns: list[str]) -> frozenset[str]:
    """Names of the network's parameters that match one of the patterns and none of those that begin with "!".

    Args:
        network: any module.
        patterns: as in file names: "head.*" matches "head.weight" and "head.bias".

    Raises:
        ValueError: a pattern matches no parameter, or nothing is left.
    """
    names = [name for name, p in network.named_parameters() if p.requires_grad]
    for pattern in patterns:
        if not matches(names, pattern.removeprefix("!")):
            some = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
            raise ValueError(f"adapt: {pattern!r} matches no parameter; there are {some}.")
    wanted = {name for p in patterns if not p.startswith("!") for name in matches(names, p)}
    unwanted = {name for p in patterns if p.startswith("!") for name in matches(names, p[1:])}
    if not wanted - unwanted:
        raise ValueError(f"adapt={patterns} leaves no parameter to adapt: give a pattern without an exclamation mark.")
    return frozenset(wanted - unwanted)
