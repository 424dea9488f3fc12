"""Faster ways to compute functions of a network, each compared with the function as it is written before it is used."""

from __future__ import annotations

import logging
import random
import sys
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fomal.utils.checks import first_line
from fomal.utils.fingerprint import Snapshot, changes, described
from fomal.utils.pytree import leaves, map_leaves, parts, signature
from fomal.utils.tree import Tree, difference

log = logging.getLogger(__name__)

ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-3}
"""How far sums in another order may take a result, relative to its norm; in less than 32 bits, `LARGEST["whole"]`."""
SPREAD = 10
"""A faster way may be off so many times as far as rounding takes the plain function, up to a part of the norm."""
LARGEST = {"whole": 0.1, "most": 0.02, "each": 0.5}
"""That part: for a result as a whole, for most of the tasks, and for every one."""
MOST_CHANGES = 20
"""How often a network may change before no ways are made any more, since each may take a second or more."""


class Backend:
    """One kind of faster ways to compute functions of a network: vectorised, traced, or as a CUDA graph.

    A way is made at the first use for each key, and kept where it gives what the plain function gives. A result that
    is not finite tells nothing, and that call is plain. Where there is no way, functions run plainly from then on, and
    one line says why. Random states are as if none of this had been. Where the network has changed, in its modules,
    their settings, hooks or tensors, all ways are forgotten.

    Args:
        network: what functions depend on beside their arguments and their names.
        line: the message where functions run plainly, with %s for the reason.
        draws: the reason where they draw random numbers; empty where they may.
        kind: "trace" or "capture", which would do only once whatever they do beside operations on tensors; empty where
            they may do that.
        storages: also take parameters and buffers for others where they are in another memory.

    Attributes:
        ways: by key.
        reason: why functions run plainly; empty where they do not.
    """

    passes: tuple[type[Exception], ...] = ()
    """Errors of making a way that are left to the caller."""

    def __init__(self, network: nn.Module, line: str, draws: str = "", kind: str = "", storages: bool = False) -> None:
        self.network, self.line, self.draws, self.kind, self.storages = network, line, draws, kind, storages
        self.reason, self.changes = "", 0
        self.__setstate__({})

    def __getstate__(self) -> dict[str, Any]:
        """Without ways, which a copy or another process makes for itself."""
        return {name: value for name, value in vars(self).items() if name not in ("ways", "_seen", "_own")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """See `__getstate__`."""
        vars(self).update(state)
        self._seen: Snapshot | None = None  # the network that the ways are of
        self._own: set[int] = set()  # what its forward changes in it itself
        self.forget()

    def forget(self) -> None:
        """Leave all ways, and their memory."""
        self.ways: dict[Hashable, Any] = {}

    def beside(self) -> Any:
        """Settings that functions must not change either."""
        return None

    def look(self) -> bool:
        """Tell whether the network has changed since the last look; then ways are forgotten, in the end for good."""
        seen, self._seen = self._seen, self._snapshot() if self._seen is None else self._seen.now()
        changed = seen is not None and self._seen is not seen and bool(seen.changed(self._seen) - self._own)
        if changed:
            self.forget()
            self.changes += 1
        if changed and self.kind and self.changes == MOST_CHANGES:
            self.give_up(f"it has changed {MOST_CHANGES} times, and is {self.kind}d again after each change")
        return changed

    def _snapshot(self) -> Snapshot:
        return Snapshot(self.network, self.storages)

    def key(self, name: Hashable, form: list[Hashable], tensors: list[Tensor]) -> Hashable:
        """All that a way depends on beside the values of tensors, for the network as it was at the last look.

        Args:
            name: tells functions apart, with all that they depend on beside their arguments and the network.
            form: of the arguments, see `flatten`.
            tensors: in them.
        """
        modes = self._seen.modes if self._seen is not None else ()
        return name, *form, *signature(tensors), torch.is_grad_enabled(), modes

    def way(self, key: Hashable, expect: Callable[[], Any], prove: Callable[[Any], Any], given: Any = ()) -> Any:
        """The way for a key, made at first use; None where the plain function is to be run.

        Args:
            key: see `key`.
            expect: runs the plain function, whose errors are its own.
            prove: makes the way and compares it with this result; its errors say why there is none.
            given: tensors which the function must not change.
        """
        found = self.ways.get(key)
        if found is not None or self.reason:
            return found
        with kept_random_states() as drawn:
            before, counts, beside = self._snapshot(), [*map(changes, leaves(given))], self.beside()
            expected = expect()
            self._seen = self._snapshot()
            self._own = before.changed(self._seen) if len(before.values) == len(self._seen.values) else set()
            try:
                if self.draws and drawn():
                    raise ValueError(self.draws)
                inside = before.values == self._seen.values and counts == [*map(changes, leaves(given))]
                what = "" if inside else "its forward changes its own attributes or buffers"
                what = what or ("" if beside == self.beside() else "the loss changes its own attributes")
                if self.kind and what:
                    raise ValueError(f"{what}, as a {self.kind} would once only")
                if not all(t.isfinite().all() for t in leaves(expected)):
                    return None
                found = self.ways[key] = prove(expected)
            except self.passes:
                raise
            except Exception as error:  # of networks, of torch's tools and of users' modules: many kinds
                self.give_up(first_line(error))
        return found

    def give_up(self, reason: str) -> None:
        """Run functions plainly from now on, and say why."""
        self.forget()
        self.reason = reason
        log.warning(self.line, reason)


def deviation(
    found: Any, expected: Any, rough: Any = None, whole: float | None = None, most: float | None = None
) -> tuple[int, float, float] | None:
    """The first part of a result that differs from what is expected by more than is allowed; None where none does.

    Each part, such as the gradients of all parameters, is measured by its norm.

    Args:
        found: tensors in nested dicts and tuples.
        expected: likewise.
        rough: likewise; it differs from `expected` by rounding. Where it differs more, more is allowed.
        whole: the most for a part as a whole, or for each of its tasks; None: by dtype.
        most: where given, parts by task are measured task by task, and this is the most for half of the tasks.

    Returns:
        The place of the part, and relative to its norm, for the task that is furthest off, how far it is off, and how
        far rounding takes it.
    """
    rough = expected if rough is None else rough
    for place, (a, b, c) in enumerate(zip(parts(found), parts(expected), parts(rough), strict=True)):
        heads = {t.shape[:1] for t in b.values()}
        by_task = most is not None and len(heads) == 1 and heads.isdisjoint([torch.Size(), torch.Size([0])])
        errors, spread = _errors(a, b, by_task), _errors(c, b, by_task)
        each = ROUNDING.get(next(iter(b.values())).dtype, LARGEST["whole"]) if whole is None else whole
        middle = (len(errors) - 1) // 2
        limits: list[Any] = [(-1, each, "whole")] if len(errors) == 1 else [(-1, each, "each"), (middle, most, "most")]
        if any(errors[i] > max(least, min(SPREAD * spread[i], LARGEST[kind])) for i, least, kind in limits):
            return place, errors[-1], spread[-1]
    return None


def _errors(found: Tree, expected: Tree, by_task: bool) -> list[float]:
    """How far each task is off, relative to its norm, in order of size; one number for all that is not by task."""
    sides = [{n: (t if by_task else t[None]).detach().cpu().double() for n, t in s.items()} for s in (found, expected)]
    errors = []
    for task in range(len(next(iter(sides[1].values())))):
        error, scale = difference(*({name: t[task] for name, t in side.items()} for side in sides))
        errors.append(error / scale.clamp_min(torch.finfo(scale.dtype).tiny))
    return sorted(torch.stack(errors).nan_to_num(torch.inf, torch.inf).tolist())


def in_float64(function: Callable[..., Any], args: Any) -> tuple[Any, Any] | None:
    """Arguments and result of a function in float64; None where it fails so, or the device has no such numbers."""
    try:
        wide = map_leaves(lambda t: t.double() if t.is_floating_point() else t, args)
        return wide, function(*wide)
    except Exception:  # of networks with types of their own, and devices: many kinds
        return None


@contextmanager
def kept_random_states() -> Iterator[Callable[[], bool]]:
    """Put the states of all random generators back at the end; yields a look whether any has been drawn from since."""
    generators: list[Any] = [(random.getstate, random.setstate), (torch.get_rng_state, torch.set_rng_state)]
    if numpy := sys.modules.get("numpy"):
        generators.append((numpy.random.get_state, numpy.random.set_state))
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        generators.append((torch.cuda.get_rng_state_all, torch.cuda.set_rng_state_all))

    def states() -> list[Any]:
        return [described(map_leaves(lambda t: t.numpy().tobytes(), read())) for read, _ in generators]

    before, kept = states(), [read() for read, _ in generators]
    try:
        yield lambda: states() != before
    finally:
        if states() != before:
            for (_, restore), state in zip(generators, kept, strict=True):
                restore(state)
