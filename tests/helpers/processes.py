"""Run a function in several processes that train together, as torchrun would start them."""

from __future__ import annotations

import faulthandler
import logging
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

FRESH = multiprocessing.get_context("spawn")
FORK = multiprocessing.get_context("fork")  # Lightning is imported already, which takes seconds


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


class Group:
    """Processes 0 .. world - 1, each running `target(*args)`; with world 1 and `alone` there is no launcher.

    Args:
        world: how many.
        target: runs in each.
        args: its arguments.
        out: folder for what they print, in a file for each.
        environment: further variables.
        nodes: how many nodes they say that they are on, each with as many.
        fresh: start them anew, as users do, rather than as forks of a test's process, whose threads are not theirs;
            importing Lightning takes seconds in each.
    """

    def __init__(
        self,
        world: int,
        target: Callable[..., Any],
        *args: Any,
        out: Path,
        environment: dict[str, str] | None = None,
        nodes: int = 1,
        fresh: bool = False,
    ) -> None:
        port = str(free_port())
        self.logs = [out / f"process{rank}.log" for rank in range(world)]
        self.processes: list[Any] = []
        for rank in range(world):
            variables = {} if world == 1 else self._variables(rank, world, world // nodes, port)
            own = (target, args, variables | (environment or {}), self.logs[rank])
            process = (FRESH if fresh else FORK).Process(target=_run, args=own)
            process.start()
            self.processes.append(process)

    @staticmethod
    def _variables(rank: int, world: int, local: int, port: str) -> dict[str, str]:
        return {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank % local),
            "GROUP_RANK": str(rank // local),
            "WORLD_SIZE": str(world),
            "LOCAL_WORLD_SIZE": str(local),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "TORCHELASTIC_RUN_ID": "test",
        }

    def wait(self, seconds: float = 120) -> list[int | None]:
        """The exit codes; processes that last longer are killed, and have the code -9."""
        end = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0, end - time.monotonic()))
        for process in self.processes:
            if process.is_alive():
                os.kill(process.pid or 0, signal.SIGUSR2)  # it says where it is
                time.sleep(0.5)
                process.kill()
                process.join()
        return [process.exitcode for process in self.processes]

    def send(self, number: int, rank: int | None = None) -> None:
        """Send a signal to one process, or to all."""
        for place, process in enumerate(self.processes):
            if rank in (None, place) and process.is_alive():
                os.kill(process.pid or 0, number)

    def kill(self) -> None:
        """Kill all, and wait for their end."""
        self.send(signal.SIGKILL)
        self.wait(10)

    def said(self) -> str:
        """What all of them have printed."""
        return "\n".join(log.read_text() for log in self.logs if log.exists())


def _run(target: Callable[..., Any], args: tuple[Any, ...], variables: dict[str, str], log: Path) -> None:
    os.environ.update(variables)
    sys.stdout = sys.stderr = log.open("a", buffering=1)
    for stream in (1, 2):
        os.dup2(sys.stdout.fileno(), stream)
    for logger in logging.root.manager.loggerDict.values():  # not to the stream of before
        for handler in getattr(logger, "handlers", []):
            if isinstance(handler, logging.StreamHandler):
                handler.stream = sys.stderr
    for number in (signal.SIGINT, signal.SIGTERM):  # not those of the test's own process
        signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.default_int_handler)
    faulthandler.register(signal.SIGUSR2, file=sys.stderr)
    torch.set_num_threads(1)
    target(*args)
