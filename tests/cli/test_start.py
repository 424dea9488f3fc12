"""What does no work starts fast."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

STARTED = """
import json, sys, time
import fomal
assert not {"torch", "lightning", "numpy"} & set(sys.modules)
start = time.process_time()
import torch, lightning
libraries = time.process_time()
from fomal.__main__ import main
sys.argv = ["fomal", "--help"]
try:
    main()
finally:
    print(json.dumps([libraries - start, time.process_time() - libraries]), file=sys.stderr)
"""


def test_importing_the_package_imports_no_library_and_help_takes_half_of_their_time_at_most() -> None:
    done = subprocess.run([sys.executable, "-c", STARTED], check=True, capture_output=True, text=True)
    assert "usage: fomal" in done.stdout
    libraries, help_ = json.loads(done.stderr.splitlines()[-1])
    assert help_ < 0.5 * libraries


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
