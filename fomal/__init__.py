"""fomal: few-shot learners trained with Reptile, first-order MAML and their family, on Lightning."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_FOR_USERS = ("Adapted", "adapt")  # of fomal.adaptation


def __getattr__(name: str) -> Any:
    """Import what users call when they call it, since torch and Lightning take seconds."""
    if name not in _FOR_USERS:
        raise AttributeError(f"module 'fomal' has no attribute {name!r}")
    return getattr(import_module("fomal.adaptation"), name)
