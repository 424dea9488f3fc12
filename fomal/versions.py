"""The versions that decide a result."""

from __future__ import annotations

import platform
from importlib.metadata import version

from fomal import __version__

_PACKAGES = ("torch", "lightning", "torchmetrics", "torchvision", "numpy")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a result."""
    ours = {"python": platform.python_version(), "fomal": __version__}
    return ours | {name: version(name) for name in _PACKAGES}
