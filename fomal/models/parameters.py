"""Parameters of a network by name; one that has several names (tied weights, shared modules) goes by the first."""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase

from torch import Tensor, nn


def slots(network: nn.Module) -> dict[str, str]:
    """Every place of a parameter in the network, once, by its name: the first name of the parameter there.

    A shared module's places are named by the module's first name, tied weights have one place in each of their modules.
    """
    first = {id(p): name for name, p in network.named_parameters()}
    return {name: first[id(p)] for name, p in _each_place(network, "_parameters")}


def buffers(network: nn.Module) -> dict[str, Tensor]:
    """Every place of a buffer in the network, once, by its name."""
    return dict(_each_place(network, "_buffers"))


def _each_place(network: nn.Module, kind: str) -> Iterator[tuple[str, Tensor]]:
    for prefix, module in network.named_modules():
        for name, t in getattr(module, kind).items():
            if t is not None:
                yield f"{prefix}.{name}".lstrip("."), t


def other_places(network: nn.Module, name: str) -> list[str]:
    """The places of the parameters of module `name` in other modules, by their names."""
    module = network.get_submodule(name)
    own = {id(p) for p in module.parameters()}
    inside = {id(m) for m in module.modules()}
    return [
        f"{prefix}.{key}".lstrip(".")
        for prefix, other in network.named_modules()
        if id(other) not in inside
        for key, p in other._parameters.items()
        if id(p) in own
    ]


def matching(network: nn.Module, patterns: list[str]) -> frozenset[str]:
    """Names of the network's parameters that match one of the patterns and none of those that begin with "!".

    Args:
        network: any module.
        patterns: as in file names: "head.*" matches "head.weight" and "head.bias". A parameter with several names
            matches by any of them, and goes by the first.

    Raises:
        ValueError: a pattern matches no parameter, or nothing is left.
    """
    first = {id(p): name for name, p in network.named_parameters()}
    trainable = [(name, p) for name, p in network.named_parameters(remove_duplicate=False) if p.requires_grad]
    wanted: set[str] = set()
    unwanted: set[str] = set()
    for pattern in patterns:
        found = {first[id(p)] for name, p in trainable if fnmatchcase(name, pattern.removeprefix("!"))}
        if not found:
            names = list(dict.fromkeys(first[id(p)] for _, p in trainable))
            some = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
            raise ValueError(f"adapt: {pattern!r} matches no parameter; there are {some}.")
        (unwanted if pattern.startswith("!") else wanted).update(found)
    if not wanted - unwanted:
        raise ValueError(f"adapt={patterns} leaves no parameter to adapt: give a pattern without an exclamation mark.")
    return frozenset(wanted - unwanted)
