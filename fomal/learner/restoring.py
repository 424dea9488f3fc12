"""Comparison of a checkpoint with what takes it over: one that does not fit is named before any of it is used."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from fomal.inner.optimizer import InnerOptimizer, State
from fomal.run.schema import Mismatch, check_tensors
from fomal.utils.checks import first_line

Outer = Callable[[Iterable[nn.Parameter]], tuple[Optimizer, LRScheduler]]
"""Makes an outer optimiser of some parameters, and its schedule."""

RESUMED = ("loops", "optimizer_states", "lr_schedulers")


@contextmanager
def misfits(what: str) -> Iterator[None]:
    """Say of what a mismatch is, and what to do.

    Raises:
        ValueError: in the place of a `Mismatch`.
    """
    try:
        yield
    except Mismatch as error:
        raise ValueError(f"{what} does not fit: {error}. Use a checkpoint of the same settings.") from error


def take_dtypes(network: nn.Module, weights: Mapping[str, Any]) -> None:
    """Give a network's floating-point tensors the dtypes of a file's, so that loading these rounds nothing.

    Tensors that the file does not have, such as buffers that are not saved, get the file's dtype where it has one only.

    Args:
        network: whose tensors get them.
        weights: the file's, by their names in the network.
    """
    kept = {name: t.dtype for name, t in weights.items() if isinstance(t, Tensor) and t.is_floating_point()}
    one = next(iter(kept.values())) if len(set(kept.values())) == 1 else None
    for name, tensor in [*network.named_parameters(), *network.named_buffers()]:
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(kept.get(name, one or tensor.dtype))


def take_state(carried: State | None, optimizer: InnerOptimizer, adapted: Mapping[str, Tensor]) -> State | None:
    """Copy a carried state, in the dtypes that a new one for these parameters has; it has passed `check_carried`.

    Args:
        carried: of the checkpoint, which may be mapped from its file and of another precision.
        optimizer: the inner optimiser that goes on from it.
        adapted: the parameters, as they are adapted.
    """
    if carried is None:
        return None
    new = optimizer.init(adapted)
    return {
        part: {name: t.to(new[part][name].dtype, copy=True) for name, t in values.items()}
        for part, values in carried.items()
    }


def check_module(module: L.LightningModule, checkpoint: Mapping[str, Any]) -> None:
    """Compare weights with those of a module, and try the states of callbacks on copies of the trainer's.

    Raises:
        Mismatch: naming the entry.
    """
    plain = [
        {k: t for k, t in s.items() if isinstance(t, Tensor)} for s in (checkpoint["state_dict"], module.state_dict())
    ]
    found, expected = plain
    if not module.strict_loading:
        found, expected = ({k: t for k, t in part.items() if k in found and k in expected} for part in plain)
    check_tensors(found, expected, "its state_dict", "the model")
    saved = checkpoint.get("callbacks", {})
    trainer: Any = module._trainer
    for callback in [] if trainer is None else trainer.callbacks:
        state = saved.get(callback.state_key)
        if state:
            with _naming(f"callbacks.{callback.state_key}"):
                copy.copy(callback).load_state_dict(copy.deepcopy(state))


def check_carried(
    carried: State | None, optimizer: InnerOptimizer, adapted: Mapping[str, Tensor], needed: bool
) -> None:
    """Compare a carried state with a new one.

    Args:
        carried: of the checkpoint.
        optimizer: the inner optimiser that goes on from it.
        adapted: the checkpoint's tensors that it adapts.
        needed: whether the checkpoint's run has made meta-iterations that carry one on.

    Raises:
        Mismatch: naming part and entry.
    """
    expected = optimizer.init({name: t.to(torch.promote_types(t.dtype, torch.float32)) for name, t in adapted.items()})
    whose = f"the state of {type(optimizer).__name__}"
    if carried is None:
        if needed and expected:
            raise Mismatch(f"its fomal.carried is null, so {whose} would begin afresh, which inner_state=reset says")
        return
    found, wanted = ({part: torch.empty(0) for part in state} for state in (carried, expected))
    check_tensors(found, wanted, "its fomal.carried", whose)
    for part, tensors in expected.items():
        check_tensors(carried[part], tensors, f"its fomal.carried.{part}", whose, exact=True)


def check_outer(
    make: Outer, parameters: Mapping[str, nn.Parameter], checkpoint: Mapping[str, Any], stepped: Iterable[str]
) -> None:
    """Load the states of outer optimiser and schedule on copies of the parameters, and try a step without gradients.

    Args:
        make: makes both.
        parameters: those that they are of.
        checkpoint: which has the states.
        stepped: names of parameters that have been moved, so that the optimiser has a state of theirs if it keeps one.

    Raises:
        Mismatch: naming the entry.
    """
    for name in RESUMED:
        if name not in checkpoint:
            raise Mismatch(f"it has no {name}, and cannot be gone on from: it was saved with weights alone")
        if name != "loops" and len(checkpoint[name]) != 1:
            raise Mismatch(f"its {name} has {len(checkpoint[name])} entries, not 1")
    moved = _copies(parameters)
    try:
        tried, schedule = make(moved.values())
        tried.step()
        schedule.step()
    except Exception:  # an optimiser that works on other devices alone, say
        return
    copies = _copies(parameters)
    optimizer, schedule = make(copies.values())
    with _naming("optimizer_states.0"):
        optimizer.load_state_dict(copy.deepcopy(checkpoint["optimizer_states"][0]))
        for name in stepped:
            kept = {key for key, value in tried.state.get(moved[name], {}).items() if value is not None}
            if missing := sorted(kept - optimizer.state.get(copies[name], {}).keys()):
                raise ValueError(f"it has no {missing[0]} of {name}, so {type(tried).__name__} would begin afresh")
        optimizer.step()
        if not all(p.isfinite().all() for group in optimizer.param_groups for p in group["params"]):
            raise ValueError("a step without gradients leaves values that are not finite")
    with _naming("lr_schedulers.0"):
        schedule.load_state_dict(copy.deepcopy(checkpoint["lr_schedulers"][0]))
        if type(schedule.last_epoch) is not int or not 0 <= schedule.last_epoch <= checkpoint["global_step"]:
            raise ValueError(
                f"last_epoch={schedule.last_epoch} is none of 0 to global_step={checkpoint['global_step']}"
            )
        schedule.step()
        if not all(math.isfinite(group["lr"]) for group in optimizer.param_groups):
            raise ValueError("the step size is not finite")


def _copies(parameters: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    copies = {name: nn.Parameter(p.detach().clone()) for name, p in parameters.items()}
    for p in copies.values():
        p.grad = torch.zeros_like(p)
    return copies


@contextmanager
def _naming(entry: str) -> Iterator[None]:
    """Turn whatever a state of a wrong kind leads to into a `Mismatch`."""
    try:
        yield
    except Exception as error:  # states are read by torch's, Lightning's and the user's code
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise Mismatch(f"its {entry} cannot be used ({kind}{first_line(error)})") from error
