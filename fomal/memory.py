"""How many tasks fit into memory at once."""

from __future__ import annotations

import logging
import math
import os
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fomal.checks import first_line, positive
from fomal.distributed import processes
from fomal.inner.rollout import InnerLoop

log = logging.getLogger(__name__)

SHARE = 0.5
"""Of the memory that is free, what tasks may take: estimates leave out what an operation needs for itself alone."""

MIB = 2**20

R = TypeVar("R")


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
        self._fitting: dict[tuple[Any, ...], int] = {}
        self._said: set[str] = set()

    def each(
        self, kind: str, inner: InnerLoop, run: Callable[[InnerLoop], R], steps: int | None = None
    ) -> Iterator[tuple[R, float]]:
        """Run consecutive chunks of the tasks.

        Args:
            kind: what the tasks are for, in a word.
            inner: the inner loops of all tasks.
            run: what to do with those of a chunk.
            steps: how many inner steps show the memory of a task; None: all.

        Returns:
            What `run` returns, and the chunk's share of the tasks. A chunk of all tasks is `inner` itself.

        Raises:
            torch.OutOfMemoryError: a chunk does not fit, and may not be made smaller.
        """
        tasks, begin = inner.tasks, 0
        key = (
            kind,
            inner.replicas,
            inner.episode.support_x.shape[1:],
            inner.episode.query_x.shape[1:],
            len(inner.plan),
        )
        if key not in self._fitting:
            self._fitting[key] = self.given or self._choose(kind, inner, run, steps)
        while begin < tasks:
            size = min(self._fitting[key], tasks - begin)
            found = self._attempt(run, inner if size == tasks else inner.only(slice(begin, begin + size)))
            if found is None:
                self._fitting[key] = size // 2
                log.warning("%d %s tasks at a time do not fit into memory: going on with %d", size, kind, size // 2)
                continue
            begin += size
            yield found, size / tasks

    def _choose(self, kind: str, inner: InnerLoop, run: Callable[[InnerLoop], R], steps: int | None) -> int:
        tasks, free = inner.tasks, free_bytes(inner.episode.support_x.device)
        if free == math.inf:
            return sys.maxsize
        needed = self._attempt(lambda one: task_bytes(one, run, steps), inner.only(slice(0, 1))) or 1
        fitting = int(max(1, SHARE * free // needed))
        if fitting < tasks and kind not in self._said:
            self._said.add(kind)
            log.warning(
                "adapting %d of %d %s tasks at a time: a task takes about %.1f MiB and %.1f MiB are free; set "
                "model.tasks_per_chunk to choose",
                *(fitting, tasks, kind, needed / MIB, free / MIB),
            )
        return fitting

    def _attempt(self, run: Callable[[InnerLoop], R], inner: InnerLoop) -> R | None:
        """What `run` returns; None where it is to be tried with fewer tasks."""
        tasks = inner.tasks
        try:
            return run(inner)
        except torch.OutOfMemoryError as error:
            if tasks == 1:
                remedy = "one task alone does not fit: adapt with smaller mini-batches, fewer examples or a smaller "
                remedy += "network, or use a rule that does not differentiate through the inner loop"
            elif self.given is not None:
                remedy = f"{tasks} tasks at a time do not fit: lower model.tasks_per_chunk={self.given}"
            else:
                remedy = ""
            if remedy:
                raise torch.OutOfMemoryError(f"{remedy}. ({first_line(error)})") from error
        # Outside of the handler, which keeps what failed alive.
        if inner.episode.support_x.is_cuda:
            torch.cuda.empty_cache()
        return None


def task_bytes(inner: InnerLoop, run: Callable[[InnerLoop], object], steps: int | None = None) -> int:
    """The memory that `run` takes for the first task alone, beyond what is there before; leaves random states alone.

    T tasks take T times as much or less: what does not grow with them is counted too. Steps are run as they are
    written, not recorded for the shape of one task.

    Args:
        inner: the inner loops.
        run: what to do with them.
        steps: run so many inner steps alone.
    """
    one = inner.only(slice(0, 1))
    one = replace(one, plan=one.plan[:steps], objective=one.objective.as_written())
    device = inner.episode.support_x.device
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
    """Memory that this process may still take on `device`; infinite where it is not known."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return float(torch.cuda.mem_get_info(device)[0] + unused)
    if device.type != "cpu":
        return math.inf
    here = int(os.environ.get("LOCAL_WORLD_SIZE", processes()))
    return min(_system_bytes(Path("/")), _cgroup_bytes(Path("/"))) / here


def _system_bytes(root: Path) -> float:
    """What Linux says is available."""
    with suppress(OSError):
        for line in (root / "proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024.0
    return math.inf


def _cgroup_bytes(root: Path) -> float:
    """What this process's control groups (of either version) and those above them leave."""
    left = [math.inf]
    with suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers not in ("", "memory"):
                continue
            mount = root / "sys/fs/cgroup" / controllers
            # Inside a container the path may be that on the host, and the mount itself is the container's group.
            below = Path(*(part for part in Path(path).parts[1:] if part != ".."))
            left += [_left(mount / part, controllers == "memory") for part in (below, *below.parents)]
    return min(left)


def _left(group: Path, first_version: bool) -> float:
    """The limit of a control group less its usage, in which the files that the kernel can drop do not count."""
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if first_version else ("memory.max", "memory.current")
    with suppress(OSError, ValueError):  # no such group, or "max"
        limit, used = (int((group / name).read_text()) for name in names)
        files = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        prefix = "total_" if first_version else ""
        return float(limit - used + sum(int(files.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive")))
    return math.inf
