"""What does no work starts fast."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

LIBRARIES = ["-c", "import torch, lightning"]
STARTS = {"import fomal": ["-c", "import fomal"], "fomal --help": ["-m", "fomal", "--help"]}


def seconds(arguments: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
    return time.perf_counter() - started


def test_import_and_help_take_no_longer_than_the_libraries_alone() -> None:
    best: dict[str, float] = {}
    for _ in range(2):  # the second time only after a busy moment of the machine
        for name, arguments in {**STARTS, "libraries": LIBRARIES}.items():
            best[name] = min(best.get(name, float("inf")), seconds(arguments))
        if all(best[name] < 1.5 * best["libraries"] for name in STARTS):
            return
    pytest.fail(f"seconds: {best}")


def test_importing_the_package_imports_no_library() -> None:
    code = "import sys, fomal; assert not {'torch', 'lightning', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
