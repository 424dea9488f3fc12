"""Two hosts, as two network namespaces on this machine: equality with one host, and what happens when one is lost.

Of what takes minutes, the first test is all that must not be slow: two processes that say they are on two nodes.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.launch import TORCHRUN, Launched, fit, workers
from tests.helpers.resume import Run, same

SCRIPT = Path(__file__).resolve().parents[3] / "shared" / "cluster" / "two-hosts.sh"
LAUNCH = (2, 0)


def hosts(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", str(SCRIPT), *args], capture_output=True, text=True)


@pytest.fixture
def network() -> Iterator[None]:
    """The two hosts."""
    if not SCRIPT.is_file():
        pytest.skip("needs the recipe ../shared/cluster/two-hosts.sh beside the repository")
    hosts("down")  # what an interrupted test left
    made = hosts("up")
    if made.returncode:
        hosts("down")
        pytest.skip(f"network namespaces cannot be made here: {made.stderr.strip().splitlines()[-1]}")
    yield
    hosts("down")


class Cluster:
    """`torchrun` on two hosts; each starts it again when it fails, as a cluster's scheduler would."""

    def __init__(self, run: Run, launch: Callable[..., Launched], restarts: int) -> None:
        self.run, self.launch, self.restarts = run, launch, restarts
        self.hosts: dict[int, Launched] = {}

    def start(self, host: int) -> None:
        out = self.run.folder / f"host{host}-{time.monotonic_ns()}.log"
        rendezvous = ("--rdzv-backend=c10d", "--rdzv-id=j1", "--rdzv-endpoint=10.9.0.1:29500")
        torchrun = [*TORCHRUN, "--nnodes=2", "--nproc-per-node=1", *rendezvous, f"--max-restarts={self.restarts}"]
        more = fit(self.run, "--trainer.devices=1", "--trainer.num_nodes=2")
        self.hosts[host] = self.launch(["bash", str(SCRIPT), "exec", str(host), *torchrun, *more], out)

    def said(self) -> str:
        return "\n".join(path.read_text() for path in sorted(self.run.folder.glob("host*.log")))

    def saved(self) -> bool:
        return bool(list(self.run.folder.glob("runs/sine/*/checkpoints/last.ckpt")))

    def wait_until_saved(self) -> None:
        self.hosts[1].until(self.saved, 120)

    def finish(self, seconds: float = 400) -> None:
        """Wait for the end of the run, starting again a host whose torchrun has given up."""
        end = time.monotonic() + seconds
        while any(code := [host.process.poll() for host in self.hosts.values()]) or None in code:
            assert time.monotonic() < end, self.said()
            for number, host in list(self.hosts.items()):
                if host.process.poll() not in (None, 0):
                    self.start(number)
            time.sleep(0.5)


@pytest.fixture
def cluster(network: None, launch: Callable[..., Launched], tmp_path: Path) -> Callable[..., Cluster]:
    """Starts a run on both hosts."""

    def start(pause: float = 0.0, restarts: int = 3) -> Cluster:
        made = Cluster(Run(tmp_path / "run", LAUNCH, pause), launch, restarts)
        for host in (1, 2):
            made.start(host)
        return made

    return start


def test_two_nodes_train_what_one_does(whole: Any, tmp_path: Path) -> None:
    both = Run(tmp_path / "run", LAUNCH)
    group = both.start("--trainer.devices=1", "--trainer.num_nodes=2", nodes=2)
    assert group.wait(100) == [0, 0], group.said()
    same(both.found(), whole(LAUNCH))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_hosts_train_what_one_does(cluster: Any, whole: Any) -> None:
    both = cluster()
    both.finish()
    same(both.run.found(), whole(LAUNCH))


def saved(cluster: Any) -> Cluster:
    """A run that has a checkpoint, slow enough to be interrupted."""
    both: Cluster = cluster(pause=0.1)
    both.wait_until_saved()
    return both


def goes_on(both: Cluster, whole: Any) -> None:
    """Assert that it ends from its checkpoint, with all that an uninterrupted run leaves."""
    both.finish()
    assert "going on from" in both.said()
    same(both.run.found(), whole(LAUNCH))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_worker_that_is_killed_is_started_again(cluster: Any, whole: Any) -> None:
    both = saved(cluster)
    os.kill(workers(both.hosts[2].process.pid)[-1], signal.SIGKILL)
    goes_on(both, whole)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_host_that_is_killed_and_comes_back_goes_on(cluster: Any, whole: Any) -> None:
    both = saved(cluster)
    inside = subprocess.run(["ip", "netns", "pids", "h2"], capture_output=True, text=True, check=True).stdout.split()
    for pid in inside:
        os.kill(int(pid), signal.SIGKILL)
    time.sleep(5)
    goes_on(both, whole)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_wire_that_is_cut_and_mended(cluster: Any, whole: Any) -> None:
    both = saved(cluster)
    hosts("cut", "2")
    time.sleep(25)  # until TCP has given up
    hosts("mend", "2")
    goes_on(both, whole)
