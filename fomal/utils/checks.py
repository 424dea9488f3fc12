"""Checks of settings, and short texts of errors: one line that names setting, value and remedy."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from numbers import Integral, Number, Real
from typing import Any

import torch
from torch import Tensor

LARGEST = 2**31 - 1
"""The most that anything is counted to, unless a smaller bound is given."""

MANY = 1_000_000
"""The most of what is in memory all at once: steps, and the examples of a mini-batch."""

WIDE = 100_000_000
"""The most inputs or outputs of a layer."""

_WHOLE: Any = Integral  # numpy's numbers too; for mypy they are not ordered
_REAL: Any = Real | Tensor
_SIDE = 2**16  # pixels
_WEIGHT = 16  # bytes of one in training: itself, where it has been adapted to, and both gradients


def positive(most: int = LARGEST, /, **values: int) -> None:
    """Raise ValueError for the first named value that is no whole number from 1 to `most`."""
    for name, value in values.items():
        _whole(name, value, most)
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1.")


def several(**values: int) -> None:
    """Raise ValueError for the first named number of classes below 2: one alone is always guessed right."""
    for name, value in values.items():
        _whole(name, value, LARGEST)
        if value < 2:
            raise ValueError(f"{name}={value} must be at least 2: with one class there is nothing to tell apart.")


def countable(most: int = LARGEST, /, **values: int) -> None:
    """Raise ValueError for the first named value that is no whole number from 0 to `most`."""
    for name, value in values.items():
        _whole(name, value, most)
        if value < 0:
            raise ValueError(f"{name}={value} must not be negative.")


def _whole(name: str, value: Any, most: int) -> None:
    if isinstance(value, bool) or not isinstance(value, _WHOLE):
        raise ValueError(f"{name}={value!r} must be a whole number.")
    if value > most:
        raise ValueError(f"{name}={value} must be at most {most}.")


def nonnegative(**values: Any) -> None:
    """Raise ValueError for the first named value that is no finite number, or is negative."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, _REAL):
            raise ValueError(f"{name}={value!r} must be a number.")
        if not 0 <= value < math.inf:
            raise ValueError(f"{name}={value} must not be negative, infinite or NaN.")


def numbers(**values: Any) -> None:
    """Raise ValueError for the first named value that is no list of finite numbers."""
    for name, value in values.items():
        plain = list(value) if isinstance(value, Iterable) and not isinstance(value, str) else [None]
        if not all(isinstance(one, _REAL) and math.isfinite(one) for one in plain):
            raise ValueError(f"{name}={value!r} must be a list of finite numbers.")


def height_and_width(image_size: Any) -> tuple[int, int]:
    """Both sides, in pixels, of images whose size is one number or two; ValueError for anything else."""
    sides = [image_size, image_size] if isinstance(image_size, Number) else image_size
    if not isinstance(sides, list | tuple) or len(sides) != 2:
        raise ValueError(f"image_size={image_size!r} must be a number of pixels, or [height, width].")
    for side in sides:
        positive(_SIDE, image_size=side)
    return sides[0], sides[1]


def fits_memory(what: str, numbers: int, of_bytes: int, /, **sizes: object) -> None:
    """Raise ValueError, naming the sizes, where so many numbers are more than the machine's memory.

    Args:
        what: what is made of the numbers.
        numbers: how many there are.
        of_bytes: the size of each.
        sizes: the settings that decide it.
    """
    needed, there = numbers * of_bytes, machine_bytes()
    if needed > there:
        given = ", ".join(f"{name}={value}" for name, value in sizes.items())
        raise ValueError(
            f"{given}: {what} would take {needed / 1e9:.3g} GB, and this machine has {there / 1e9:.3g}: use less."
        )


def fits_as_weights(what: str, weights: int, /, **sizes: object) -> None:
    """As `fits_memory`, of weights that are to be trained; on torch's meta device they take none."""
    if torch.get_default_device().type != "meta":
        fits_memory(what, weights, _WEIGHT, **sizes)


def machine_bytes() -> float:
    """The machine's memory; infinite where it is not known."""
    try:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, OSError, ValueError):  # not on every system
        return math.inf


def one_of(choices: Iterable[str], **values: str) -> None:
    """Raise ValueError for the first named value that is not among the choices."""
    choices = list(choices)
    for name, value in values.items():
        if value not in choices:
            raise ValueError(f"{name}={value!r} is unknown: use one of {', '.join(choices)}.")


def of_type(kind: type, **values: object) -> None:
    """Raise TypeError for the first named value that is no `kind`."""
    for name, value in values.items():
        if not isinstance(value, kind):
            raise TypeError(f"{name}={value!r} must be made with {kind.__module__}.{kind.__name__}(...).")


def first_line(error: BaseException) -> str:
    """The first line of an error's text, for a message of our own; its kind where it has no text."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def some(names: Iterable[object], most: int = 5) -> str:
    """The first of many names, and how many more there are."""
    texts = [str(name) for name in names]
    return ", ".join(texts[:most]) + (f" and {len(texts) - most} more" if len(texts) > most else "")
