"""Everything that a computation depends on beside its arguments, as values that can be compared later."""

from __future__ import annotations

import functools
import types
from collections.abc import Mapping
from copy import copy
from enum import Enum
from typing import Any

import numpy as np
import torch
import torch.nn.modules.module as torch_modules
from torch import Tensor, nn

DEEP, SHALLOW = 8, 4  # how far to look into objects: of rules and optimisers, and of modules
LONG = 1000  # entries of a container beyond which it is told apart by identity

_NUMBERS = {float, complex}
_VALUES = {bool, int, str, bytes, type(None)}
_KINDS = (type, types.ModuleType, types.BuiltinFunctionType, Enum, torch.dtype, torch.device, torch.Size)


class Same:
    """An object told apart by identity, and kept alive so that nothing else is given that; a tensor by changes too."""

    __slots__ = ("changes", "value")

    def __init__(self, value: Any) -> None:
        self.value = value
        self.changes = changes(value) if isinstance(value, Tensor) else 0

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.value is other.value and self.changes == other.changes

    def __hash__(self) -> int:
        return hash((id(self.value), self.changes))


def changes(t: Tensor) -> int:
    """Count how often a tensor has changed in place; torch does not count it of tensors made in inference mode."""
    return 0 if t.is_inference() else t._version


def settings(part: object) -> tuple[Any, ...]:
    """The kind of a rule or an optimiser with its attributes, and theirs: equal for equal settings, and hashable."""
    return type(part), *((name, described(value, DEEP)) for name, value in _attributes(part).items())


def described(value: Any, depth: int = DEEP) -> Any:
    """A value by what is in it, down to `depth`; what cannot be looked into by identity."""
    kind = value.__class__
    if kind in _VALUES:
        return kind, value
    if kind in _NUMBERS:
        return kind, repr(value)  # a NaN is itself
    if isinstance(value, _KINDS):
        return value
    if isinstance(value, Tensor) or not depth:
        return Same(value)
    if isinstance(value, np.ndarray | np.generic):
        return kind, value.shape, value.dtype.str, value.tobytes()
    if isinstance(value, Mapping | list | tuple | set | frozenset) and len(value) > LONG:
        return Same(value), len(value)
    if isinstance(value, Mapping):
        return kind, *((described(k, depth - 1), described(v, depth - 1)) for k, v in value.items())
    if isinstance(value, list | tuple):
        return kind, *(described(v, depth - 1) for v in value)
    if isinstance(value, set | frozenset):
        return kind, frozenset(described(v, depth - 1) for v in value)
    return _described_object(value, depth)


def _described_object(value: Any, depth: int) -> Any:
    if isinstance(value, types.FunctionType):
        inside = [cell.cell_contents for cell in value.__closure__ or () if cell != types.CellType()]
        return Same(value), described([inside, value.__defaults__, value.__kwdefaults__], depth)
    if isinstance(value, types.MethodType):
        return Same(value.__func__), described(value.__self__, depth - 1)
    if isinstance(value, functools.partial):
        return described((value.func, value.args, value.keywords), depth)
    attributes = _attributes(value)
    if not attributes:
        return Same(value)
    return type(value), *((name, described(v, depth - 1)) for name, v in attributes.items())


def _attributes(value: object) -> dict[str, Any]:
    slots = (name for kind in type(value).__mro__ for name in _names(getattr(kind, "__slots__", ())))
    return {name: getattr(value, name) for name in slots if hasattr(value, name)} | getattr(value, "__dict__", {})


def _names(slots: Any) -> tuple[str, ...]:
    names = (slots,) if isinstance(slots, str) else tuple(slots)
    return tuple(name for name in names if name not in ("__dict__", "__weakref__"))


class Snapshot:
    """A network at one time: all its modules with their settings, hooks and tensors, these by identity.

    Networks with equal `values` and `modes` compute the same function of the tensors in them.

    Args:
        network: any module.
        storages: also tell parameters and buffers apart by the memory they are in.

    Attributes:
        values: what is found, in order.
        modes: `training` of each module.
    """

    def __init__(self, network: nn.Module, storages: bool = False) -> None:
        self.network, self.storages = network, storages
        self.values: list[Any] = [*(tuple(hooks) for hooks in _GLOBAL_HOOKS), torch.get_default_dtype()]
        self._modules = list(network.modules())
        self._containers: list[Any] = []  # that may change in place
        self._tensors: list[Tensor] = []  # likewise
        self._held: list[Any] = []  # so that no identity is given to something else
        self._is_simple = not storages
        for module in self._modules:
            self._look_at(module)
        self.modes = tuple(module.training for module in self._modules)
        self._empty = [part for part in (*self._containers, *_GLOBAL_HOOKS) if not part]
        self._full = [part for part in self._containers if part]
        self._identities = self._identify()
        self._held += [part.values() if isinstance(part, dict) else part for part in map(copy, self._full)]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Snapshot) and self.values == other.values and self.modes == other.modes

    __hash__ = None  # type: ignore[assignment] # it holds lists

    def changed(self, other: Snapshot) -> set[int]:
        """The places in `values` where another snapshot differs; all where it has others."""
        if self.values == other.values:
            return set()
        if len(self.values) != len(other.values):
            return set(range(len(self.values)))
        return {i for i, (a, b) in enumerate(zip(self.values, other.values, strict=True)) if a != b}

    def now(self) -> Snapshot:
        """This snapshot itself where nothing has changed since, which is found quickly; otherwise another one."""
        if self._is_simple and not any(self._empty) and self._identify() == self._identities:
            return self
        return Snapshot(self.network, self.storages)

    def _identify(self) -> list[int]:
        found = [t._version for t in self._tensors]
        for kind in [type(module) for module in self._modules]:
            found += (id(kind), id(kind.forward))
        for part in self._full:
            found.extend(map(id, part.values() if isinstance(part, dict) else part))
        return found

    def _look_at(self, module: nn.Module) -> None:
        kind = type(module)
        self.values += (kind, kind.forward)
        self._containers.append(vars(module))
        for name, value in vars(module).items():
            if name in ("_parameters", "_buffers"):
                self._containers.append(value)
                self.values.append([(key, self._tensor(t)) for key, t in value.items()])
            elif name == "_modules":
                self._containers.append(value)
                self.values.append([(key, id(child)) for key, child in value.items()])
            elif name not in _ELSEWHERE:
                self._watch(value, SHALLOW)
                self.values.append((name, described(value, SHALLOW)))

    def _tensor(self, t: Tensor | None) -> Any:
        if t is None or not self.storages:
            return None if t is None else id(t)
        self._held.append(t.detach())  # keeps the memory, whatever becomes of `t.data`
        return id(t), t.data_ptr(), t.shape, t.stride(), t.dtype

    def _watch(self, value: Any, depth: int) -> None:
        """Note what can change in place within `value`, as deep as `described` looks."""
        if isinstance(value, Tensor) and not value.is_inference():
            self._tensors.append(value)
        elif isinstance(value, types.FunctionType | types.MethodType | np.ndarray):
            self._is_simple &= isinstance(value, types.FunctionType) and not value.__closure__
        elif depth and isinstance(value, dict | list | set) and len(value) <= LONG:
            self._containers.append(value)
            for part in value.values() if isinstance(value, dict) else value:
                self._watch(part, depth - 1)
        elif depth and isinstance(value, tuple) and len(value) <= LONG:
            for part in value:
                self._watch(part, depth - 1)
        elif depth and isinstance(getattr(value, "__dict__", None), dict) and not isinstance(value, _KINDS):
            self._watch(vars(value), depth)  # as one level


_ELSEWHERE = ("training", "_trainer", "_fabric")  # in `modes`, and what Lightning hangs into modules
_GLOBAL_HOOKS = [v for k, v in vars(torch_modules).items() if k.startswith("_global_") and isinstance(v, dict)]
