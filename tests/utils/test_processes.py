from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import TorchElasticEnvironment

from fomal.utils.processes import (
    gather,
    in_company,
    meet,
    refuse_disagreement,
    sum_over_processes,
    together,
)
from tests.helpers.ending import joined
from tests.helpers.processes import Group


def add(folder: Path) -> None:
    rank = joined()
    tensors = [torch.full((2, 3), float(rank)), torch.tensor(1e-9 * (1 + rank), dtype=torch.float64), torch.empty(0)]
    torch.save((sum_over_processes(tensors), gather({"rank": rank})), folder / f"{rank}.pt")
    halves = sum_over_processes([torch.full((4,), 1 / 512 if rank else 1.0, dtype=torch.bfloat16)])
    assert halves[0].tolist() == [1 + 1 / 512] * 4  # which bfloat16 does not hold
    dist.destroy_process_group()


def test_every_process_gets_the_sums_and_what_all_say(tmp_path: Path) -> None:
    group = Group(2, add, tmp_path, out=tmp_path)
    assert group.wait(60) == [0, 0], group.said()
    for rank in range(2):
        (matrix, scalar, nothing), said = torch.load(tmp_path / f"{rank}.pt")
        assert torch.equal(matrix, torch.ones(2, 3, dtype=torch.float64))
        assert scalar.shape == ()
        assert scalar.item() == pytest.approx(3e-9, rel=1e-12)
        assert nothing.shape == (0,)
        assert said == [{"rank": 0}, {"rank": 1}]


def test_one_process_is_left_alone() -> None:
    tensor = torch.ones(2)
    assert sum_over_processes([tensor])[0] is tensor
    assert gather(3) == [3]
    refuse_disagreement({"anything": 3})
    with pytest.raises(RuntimeError, match="^its own$"), together():
        raise RuntimeError("its own")


def lose_one() -> None:
    if joined():
        os.kill(os.getpid(), signal.SIGKILL)
    started = time.monotonic()
    try:
        sum_over_processes([torch.ones(1000)])
    except RuntimeError as error:
        print(f"after {time.monotonic() - started:.0f} s: {error}")
        sys.exit(7)


def test_a_process_that_is_gone_is_said_plainly(tmp_path: Path) -> None:
    group = Group(2, lose_one, out=tmp_path)
    assert group.wait(30) == [7, -signal.SIGKILL], group.said()
    assert "process 0: another of the 2 processes ended, or cannot be reached: see what it said" in group.said()


def start(missing: bool) -> None:
    """As a run starts, in which process 1 never comes, or is killed while data are prepared."""
    rank, started = int(os.environ["RANK"]), time.monotonic()
    if missing and rank:
        return
    try:
        with in_company():
            meet(TorchElasticEnvironment())
            joined()
            dist.barrier()
            print("all there")
            if rank:
                os.kill(os.getpid(), signal.SIGKILL)
            dist.barrier()
    except RuntimeError as error:
        print(f"after {time.monotonic() - started:.0f} s: {error}")
        sys.exit(7)


def test_a_process_that_never_starts_is_not_waited_for_half_an_hour(tmp_path: Path) -> None:
    group = Group(2, start, True, out=tmp_path, environment={"FOMAL_START_SECONDS": "2"})
    assert group.wait(30) == [7, 0], group.said()
    assert "process 0: process 1 of the 2 has not come to 127.0.0.1:" in group.said()
    assert "in 2 seconds at most: see what it said, or set FOMAL_START_SECONDS" in group.said()


def test_a_process_that_dies_in_data_preparation_ends_the_others(tmp_path: Path) -> None:
    group = Group(2, start, False, out=tmp_path)
    assert group.wait(30) == [7, -signal.SIGKILL], group.said()
    assert group.said().count("all there") == 2
    assert "process 0: another of the 2 processes ended, or cannot be reached: see what it said" in group.said()


@pytest.mark.parametrize(("how", "code"), [("nothing", 0), ("an error", 1)])
def test_the_process_group_is_left_in_order(how: str, code: int, tmp_path: Path) -> None:
    """Without that, gloo's threads abort some of the processes that end."""
    script = tmp_path / "script.py"
    script.write_text(
        "import atexit, torch.distributed as dist\n"
        "from tests.helpers.ending import end_with\n"
        "atexit.register(lambda: print('left:', not dist.is_initialized(), flush=True))\n"  # runs after ours
        f"end_with({how!r})\n"
    )

    group = Group(2, run_script, script, out=tmp_path)
    assert group.wait(90) == [code, code], group.said()
    assert group.said().count("left: True") == 2


def run_script(script: Path) -> None:
    root = str(Path(__file__).resolve().parents[2])
    os.execve(sys.executable, [sys.executable, str(script)], {**os.environ, "PYTHONPATH": root})
