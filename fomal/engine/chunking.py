"""The number of tasks that fit into memory at once."""

from __future__ import annotations

import logging
import math
import os
import sys
import weakref
from collections.abc import Callable, Hashable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fomal.utils.checks import first_line, positive
from fomal.utils.processes import processes

log = logging.getLogger(__name__)

SHARE = 0.5
"""Of the memory that is free, what tasks may take: estimates leave out what an operation needs for itself alone."""

MIB = 2**20

R = TypeVar("R")


class Tasks(Protocol):
    """Work on several tasks, which may be done on some of them at a time."""

    @property
    def tasks(self) -> int:
        """The number of tasks."""

    @property
    def device(self) -> torch.device:
        """Where the work is done."""

    @property
    def signature(self) -> Hashable:
        """All that the memory of one task depends on."""

    def select(self, tasks: slice) -> Self:
        """The work on the tasks of the given places alone."""

    def sample(self, steps: int | None) -> Self:
        """The work on the first task, as it is written; with `steps`, of so many steps alone."""


T = TypeVar("T", bound=Tasks)


class Chunks:
    """Runs the tasks of a meta-batch in chunks of as many as fit into memory, or as are asked for.

    Without a given size, the first meta-batch of each kind and shape is preceded by one task alone, whose memory is
    counted; a chunk then takes at most half of what is free. Where a device's memory does not suffice all the same,
    chunks are halved.

    Args:
        given: tasks in a chunk; None chooses.
    """

    def __init__(self, given: int | None = None) -> None:
        if given is not None:
            positive(tasks_per_chunk=given)
        self.given = given
        self._fitting: dict[Hashable, int] = {}
        self._said: set[str] = set()

    def each(self, kind: str, work: T, run: Callable[[T], R], steps: int | None = None) -> Iterator[tuple[R, float]]:
        """Run consecutive chunks of the tasks.

        Args:
            kind: what the tasks are for, in a word.
            work: on all tasks.
            run: what to do with those of a chunk.
            steps: how many of its steps show the memory of a task; None: all.

        Returns:
            What `run` returns, and the chunk's share of the tasks. A chunk of all tasks is `work` itself.

        Raises:
            torch.OutOfMemoryError: a chunk does not fit, and may not be made smaller.
        """
        tasks, begin = work.tasks, 0
        key = kind, work.signature
        if key not in self._fitting:
            self._fitting[key] = self.given or self._choose(kind, work, run, steps)
        while begin < tasks:
            size = min(self._fitting[key], tasks - begin)
            found = self._attempt(run, work if size == tasks else work.select(slice(begin, begin + size)))
            if found is None:
                self._fitting[key] = size // 2
                log.warning("%d %s tasks at a time do not fit into memory: going on with %d", size, kind, size // 2)
                continue
            begin += size
            yield found, size / tasks

    def _choose(self, kind: str, work: T, run: Callable[[T], R], steps: int | None) -> int:
        tasks, free = work.tasks, free_bytes(work.device)
        if free == math.inf:
            return sys.maxsize
        needed = self._attempt(lambda one: task_bytes(one, run, steps), work.select(slice(0, 1))) or 1
        fitting = int(max(1, SHARE * free // needed))
        if fitting < tasks and kind not in self._said:
            self._said.add(kind)
            log.warning(
                "adapting %d of %d %s tasks at a time: a task takes about %.1f MiB and %.1f MiB are free; set "
                "model.execution.tasks_per_chunk to choose",
                *(fitting, tasks, kind, needed / MIB, free / MIB),
            )
        return fitting

    def _attempt(self, run: Callable[[T], R], work: T) -> R | None:
        """What `run` returns; None where it is to be tried with fewer tasks."""
        tasks = work.tasks
        try:
            return run(work)
        except torch.OutOfMemoryError as error:
            if tasks == 1:
                remedy = "one task alone does not fit: adapt with smaller mini-batches, fewer examples or a smaller "
                remedy += "network, or use a rule that does not differentiate through the inner loop"
            elif self.given is not None:
                remedy = f"{tasks} tasks at a time do not fit: lower model.execution.tasks_per_chunk={self.given}"
            else:
                remedy = ""
            if remedy:
                raise torch.OutOfMemoryError(f"{remedy}. ({first_line(error)})") from error
        # Outside of the handler, which keeps what failed alive.
        if work.device.type == "cuda":
            torch.cuda.empty_cache()
        return None


def task_bytes(work: T, run: Callable[[T], object], steps: int | None = None) -> int:
    """The memory that `run` takes for the first task alone, beyond what is there before; leaves random states alone.

    T tasks take T times as much or less: what does not grow with them is counted too. Steps are run as they are
    written, not traced for the shape of one task.

    Args:
        work: on the tasks.
        run: what to do with them.
        steps: run so many steps alone.
    """
    one, device = work.sample(steps), work.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        return peak_bytes(lambda: run(one))


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call] # torch has no types here
    """Counts the bytes of the tensors that operations make, for as long as they live."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live: int = 0
        self.peak: int = 0
        self._storages: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage()._cdata for t in _tensors((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for t in _tensors(result):
            storage = t.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key not in given and key not in self._storages:
                self._storages[key] = weakref.ref(storage, partial(self._freed, key, size))
                self.live += size
        self.peak = max(self.peak, self.live)
        return result

    def _freed(self, key: int, size: int, _: Any) -> None:
        del self._storages[key]
        self.live -= size


def _tensors(values: Any) -> list[Tensor]:
    return [t for t in tree_leaves(values) if isinstance(t, Tensor) and t.layout == torch.strided]


def peak_bytes(run: Callable[[], object]) -> int:
    """The most memory that tensors made in `run` take at any one time, without what single operations use inside."""
    counter = _Counter()
    with counter:
        run()
    return counter.peak


def free_bytes(device: torch.device) -> float:
    """Memory that this process may still take on `device`; infinite where it is not known.

    A container's own limit is not looked at: where it is below the machine's memory, choose `tasks_per_chunk`.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return float(torch.cuda.mem_get_info(device)[0] + unused)
    if device.type != "cpu":
        return math.inf
    here = int(os.environ.get("LOCAL_WORLD_SIZE", processes()))
    return _system_bytes(Path("/")) / here


def _system_bytes(root: Path) -> float:
    """What Linux says is available."""
    with suppress(OSError):
        for line in (root / "proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024.0
    return math.inf
