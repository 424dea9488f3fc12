"""What does no work starts fast."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

IDLE = """
import sys
import fomal
from fomal.cli import main
try:
    main([sys.argv[1]])
except SystemExit as stop:
    assert stop.code == 0
assert not {"torch", "lightning", "numpy"} & set(sys.modules)
"""


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_what_needs_no_library_imports_none(option: str) -> None:
    subprocess.run([sys.executable, "-c", IDLE, option], check=True, capture_output=True)


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
