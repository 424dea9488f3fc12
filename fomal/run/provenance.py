"""The versions that decide a result."""

from __future__ import annotations

import os
import platform
import subprocess
from functools import cache
from importlib.metadata import version
from pathlib import Path

from fomal import __version__

_PACKAGES = ("torch", "lightning", "torchmetrics", "torchvision", "numpy")


@cache
def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a result."""
    ours = {"python": platform.python_version(), "fomal": __version__}
    return ours | {name: version(name) for name in _PACKAGES}


@cache
def commits() -> dict[str, str | None]:
    """The git commits of fomal and of the current folder, with "-dirty" where files differ from it; None without git.

    An image without a repository names fomal's in the environment variable FOMAL_COMMIT.
    """
    ours = os.environ.get("FOMAL_COMMIT") or _commit(Path(__file__).parent)
    return {"fomal": ours, "current_folder": _commit(Path.cwd())}


def _commit(folder: Path) -> str | None:
    """Of a tracked folder: an environment inside somebody's repository has not its commit."""
    git = ["git", "-C", str(folder)]
    try:
        tracked = subprocess.run([*git, "ls-files", "--error-unmatch", "."], capture_output=True, timeout=10).returncode
        if tracked:
            return None
        described = [*git, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        return subprocess.run(described, capture_output=True, text=True, timeout=10, check=True).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None
