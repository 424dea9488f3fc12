"""What does no work starts fast."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

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


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_process_that_is_asked_to_end_while_it_starts_does(number: int, code: int) -> None:
    """Also as the first process of a container, for which SIGTERM has no default."""
    run = subprocess.Popen(
        [sys.executable, "-m", "fomal", "fit"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # the tests may run where Ctrl-C is ignored
    )
    try:
        bit = 1 << (signal.SIGTERM - 1)
        while not int(caught(run.pid), 16) & bit:
            assert run.poll() is None
            time.sleep(0.01)
        run.send_signal(number)
        said = b"".join(run.communicate(timeout=120))
    finally:
        run.kill()
    assert run.returncode == code
    assert said == b""


def caught(pid: int) -> str:
    """The signals for which a process has handlers, as Linux shows them: a hexadecimal mask."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(line.split()[1] for line in lines if line.startswith("SigCgt"))
