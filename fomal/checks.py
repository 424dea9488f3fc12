"""Checks of settings, and short texts of errors: one line that names setting, value and remedy."""

from __future__ import annotations

from collections.abc import Iterable
from numbers import Real

from torch import Tensor


def positive(**values: int) -> None:
    """Raise ValueError for the first named value below 1."""
    for name, value in values.items():
        if not _is_number(value) or value < 1:
            raise ValueError(f"{name}={value} must be at least 1.")


def several(**values: int) -> None:
    """Raise ValueError for the first named number of classes below 2: one alone is always guessed right."""
    for name, value in values.items():
        if not _is_number(value) or value < 2:
            raise ValueError(f"{name}={value} must be at least 2: with one class there is nothing to tell apart.")


def nonnegative(**values: float) -> None:
    """Raise ValueError for the first named value that is negative or not a number."""
    for name, value in values.items():
        if not _is_number(value) or not value >= 0:
            raise ValueError(f"{name}={value} must not be negative.")


def _is_number(value: object) -> bool:
    """Exclude null, which configurations can have anywhere, and texts."""
    return isinstance(value, Real | Tensor)


def one_of(choices: Iterable[str], **values: str) -> None:
    """Raise ValueError for the first named value that is not among the choices."""
    choices = list(choices)
    for name, value in values.items():
        if value not in choices:
            raise ValueError(f"{name}={value!r} is unknown: use one of {', '.join(choices)}.")


def first_line(error: BaseException) -> str:
    """The first line of an error's text, for a message of our own; its kind where it has no text."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
