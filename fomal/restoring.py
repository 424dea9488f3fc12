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

from fomal.checks import first_line
from fomal.inner.optimizer import InnerOptimizer, State
from fomal.schema import Mismatch, check_tensors

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


def check_carried(carried: State | None, optimizer: InnerOptimizer, adapted: Mapping[str, Tensor]) -> None:
    """Compare a carried state with a new one.

    Args:
        carried: of the checkpoint.
        optimizer: the inner optimiser that goes on from it.
        adapted: the checkpoint's tensors that it adapts.

    Raises:
        Mismatch: naming part and entry.
    """
    if carried is None:
        return
    expected = optimizer.init({name: t.to(torch.promote_types(t.dtype, torch.float32)) for name, t in adapted.items()})
    whose = f"the state of {type(optimizer).__name__}"
    found, wanted = ({part: torch.empty(0) for part in state} for state in (carried, expected))
    check_tensors(found, wanted, "its fomal.carried", whose)
    for part, tensors in expected.items():
        check_tensors(carried[part], tensors, f"its fomal.carried.{part}", whose, exact=True)


def check_outer(make: Outer, parameters: Iterable[nn.Parameter], checkpoint: Mapping[str, Any]) -> None:
    """Load the states of outer optimiser and schedule on copies of the parameters, and try a step without gradients.

    Raises:
        Mismatch: naming the entry.
    """
    for name in RESUMED:
        if name not in checkpoint:
            raise Mismatch(f"it has no {name}, and cannot be gone on from: it was saved with weights alone")
        if name != "loops" and len(checkpoint[name]) != 1:
            raise Mismatch(f"its {name} has {len(checkpoint[name])} entries, not 1")
    parameters = list(parameters)
    try:
        _step(*_made(make, parameters))
    except Exception:  # an optimiser that works on other devices alone, say
        return
    optimizer, schedule = _made(make, parameters)
    with _naming("optimizer_states.0"):
        optimizer.load_state_dict(copy.deepcopy(checkpoint["optimizer_states"][0]))
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


def _made(make: Outer, parameters: Iterable[nn.Parameter]) -> tuple[Optimizer, LRScheduler]:
    copies = [nn.Parameter(p.detach().clone()) for p in parameters]
    for p in copies:
        p.grad = torch.zeros_like(p)
    return make(copies)


def _step(optimizer: Optimizer, schedule: LRScheduler) -> None:
    optimizer.step()
    schedule.step()


@contextmanager
def _naming(entry: str) -> Iterator[None]:
    """Turn whatever a state of a wrong kind leads to into a `Mismatch`."""
    try:
        yield
    except Exception as error:  # states are read by torch's, Lightning's and the user's code
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise Mismatch(f"its {entry} cannot be used ({kind}{first_line(error)})") from error
