"""Absurd sizes and values of every argument: refused in one line that names it, before memory is taken."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import is_dataclass
from functools import partial
from typing import Any, get_type_hints

import pytest
import torch
from jsonargparse import ArgumentError, ArgumentParser

import fomal.data
import fomal.inner
import fomal.models
import fomal.outer
from fomal.data.images.image_format import ImageFormat
from fomal.learner.meta_learner import MetaLearner
from fomal.learner.settings import Execution, InnerSchedule, OuterStep

NUMBERS = (10**9, 10**30, -1, 0, math.nan, math.inf, True, 1.5)
VALUES = (*NUMBERS, None, "", "x", [], {}, [10**9], [math.nan])

LEARNER = {
    "network": {"class_path": "fomal.models.MLP"},
    "rule": {"class_path": "fomal.outer.Reptile"},
    "inner_optimizer": {"class_path": "fomal.inner.SGD"},
}
BASES: dict[str, dict[str, Any]] = {
    "MetaLearner": LEARNER,
    "ImageFormat": {"height": 8, "width": 8},
    "BatchNorm": {"features": 3},
    "Classifier": {"factory": "fomal.models.Conv4"},
    "Normalized": {"network": {"class_path": "fomal.models.Conv4"}},
    "StepCombination": {"weights": [1.0, 0.5]},
    "ImageFolderDataModule": {"root": "nowhere"},
    "TasksetDataModule": {"benchmark": "cifarfs"},
}
CLASSES = {
    name: getattr(package, name)
    for package in (fomal.models, fomal.outer, fomal.inner, fomal.data)
    for name in package.__all__
    if inspect.isclass(getattr(package, name)) and not inspect.isabstract(getattr(package, name))
}
CLASSES |= {kind.__name__: kind for kind in (MetaLearner, InnerSchedule, OuterStep, Execution, ImageFormat)}
del CLASSES["Episode"], CLASSES["Expansion"]  # results, not settings

LIMIT = 10**7  # numbers of a tensor, more than the small bases have


def small(make: Callable[..., Any], *size: Any, **kwargs: Any) -> Any:
    """What `make` makes, if it is small."""
    sides = size[0] if size and isinstance(size[0], tuple | list | torch.Size) else size
    assert math.prod(side for side in sides if isinstance(side, int)) <= LIMIT, size
    return make(*size, **kwargs)


@pytest.fixture(autouse=True)
def no_large_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    """A size that gets as far as torch must be small."""
    for name in ("empty", "zeros", "ones", "full"):
        monkeypatch.setattr(torch, name, partial(small, getattr(torch, name)))


def arguments(kind: type) -> dict[str, Any]:
    """The arguments of a class and, through **kwargs, of its bases, with their types."""
    found: dict[str, Any] = {}
    for base in kind.__mro__:
        if base.__module__.startswith("fomal") and "__init__" in vars(base):
            hints = get_type_hints(base.__init__)
            parameters = inspect.signature(base.__init__).parameters
            found = {name: hints.get(name) for name in [*parameters][1:] if name != "kwargs"} | found
            if "kwargs" not in parameters:
                break
    return found


def complaint(build: Callable[[], Any]) -> str | None:
    """The message with which building fails; None where it works."""
    try:
        build()
    except (ValueError, TypeError, ArgumentError) as error:
        return str(error)
    return None


@pytest.mark.parametrize("name", CLASSES)
def test_number_that_is_absurd_is_refused_by_its_name_in_python(name: str) -> None:
    kind, wrong = CLASSES[name], []
    base = dict(BASES.get(name, {}))
    if name == "MetaLearner":
        base = {"network": fomal.models.MLP(), "rule": fomal.outer.Reptile(), "inner_optimizer": fomal.inner.SGD()}
    for argument, hint in arguments(kind).items():
        if not {int, float} & {hint, *getattr(hint, "__args__", ())}:
            continue
        for value in NUMBERS:
            said = complaint(lambda argument=argument, value=value: kind(**base | {argument: value}))
            if said is not None and (argument not in said or "\n" in said):
                wrong.append((argument, value, said))
    assert not wrong


@pytest.mark.parametrize("name", CLASSES)
def test_value_that_is_absurd_is_refused_by_its_name_in_a_configuration(name: str) -> None:
    kind, base, wrong = CLASSES[name], BASES.get(name, {}), []
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, "it")
    for argument, hint in arguments(kind).items():
        for value in [] if is_dataclass(hint) else VALUES:  # of which test_cli has some

            def build(argument: str = argument, value: Any = value) -> None:
                parser.instantiate(parser.parse_object({"it": base | {argument: value}}))

            said = complaint(build)
            if said is not None and argument not in said:
                wrong.append((argument, value, said))
    assert not wrong
