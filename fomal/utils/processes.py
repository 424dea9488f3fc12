"""The messages between the processes of a run."""

from __future__ import annotations

import atexit
import os
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial, reduce
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from fomal.utils.checks import first_line

if TYPE_CHECKING:  # it takes seconds
    from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment


def processes() -> int:
    """The number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


@contextmanager
def together() -> Iterator[None]:
    """Around work that waits for the other processes: say it plainly where one of them is gone.

    Raises:
        RuntimeError: another process has ended, or cannot be reached.
    """
    try:
        yield
    except RuntimeError as error:
        if processes() == 1:
            raise
        raise RuntimeError(
            f"process {dist.get_rank()}: another of the {processes()} processes ended, or cannot be reached: see what "
            f"it said; `--ckpt_path last` goes on from the last checkpoint. ({first_line(error)})"
        ) from error


@contextmanager
def in_company() -> Iterator[None]:
    """Around a whole run: as `together`, for what torch's own calls raise, in data preparation and setup too.

    Raises:
        RuntimeError: another process has ended, or cannot be reached.
    """
    try:
        yield
    except RuntimeError as error:
        frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
        if not str(frames[-1].f_globals.get("__name__")).startswith("torch.distributed"):
            raise
        with together():
            raise


START_SECONDS = 300.0
"""How long processes wait for each other to start, unless FOMAL_START_SECONDS says otherwise."""


def meet_first(strategy: Any) -> None:
    """Let a strategy of Lightning's wait for all processes for `START_SECONDS` at most, before their group is made.

    The group itself waits for half an hour, at its start as in each step, and then does not say for whom.
    """
    if hasattr(strategy, "set_world_ranks"):  # those that train in several processes
        strategy.setup_environment = partial(_meet_and_make, strategy)


def _meet_and_make(strategy: Any) -> None:
    strategy.set_world_ranks()
    if strategy.cluster_environment is not None:
        meet(strategy.cluster_environment)
    type(strategy).setup_environment(strategy)


def meet(environment: ClusterEnvironment) -> None:
    """Wait until all processes of a cluster have started.

    Raises:
        RuntimeError: some have not come within the time.
    """
    rank, world = environment.global_rank(), environment.world_size()
    if world == 1 or dist.is_initialized():
        return
    seconds = float(os.environ.get("FOMAL_START_SECONDS", START_SECONDS))
    served = rank != 0 or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    about = f"{environment.main_address}:{environment.main_port}"
    came: list[int] = []
    try:
        store = dist.TCPStore(  # type: ignore[attr-defined] # which its stubs leave out
            environment.main_address,
            environment.main_port,
            world,
            not served,
            timedelta(seconds=seconds),
            wait_for_workers=False,
            multi_tenant=True,
        )
        # A launcher that starts all anew keeps its store, so each start has keys of its own.
        start = f"fomal/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"
        store.set(f"{start}/{rank}", "here")
        for other in range(world):
            store.wait([f"{start}/{other}"])
            came.append(other)
        _KEPT.append(store)  # the others may still be asking
    except RuntimeError as error:
        raise RuntimeError(
            f"process {rank}: process {len(came)} of the {world} has not come to {about}, in {seconds:g} seconds at "
            f"most: see what it said, or set FOMAL_START_SECONDS to wait longer. ({first_line(error)})"
        ) from error


_KEPT: list[Any] = []


def sum_over_processes(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The sum of each tensor over all processes, in one all-reduce of one flat vector.

    Outer gradients are set by hand, so the hooks of DistributedDataParallel never see them.

    Args:
        tensors: floating-point, on one device, of the same shapes in every process. They are added in the widest of
            their dtypes, at least 32-bit.

    Returns:
        The sums, in that dtype; the tensors themselves where there is only one process.

    Raises:
        RuntimeError: another process has ended, or cannot be reached.
    """
    if processes() == 1:
        return list(tensors)
    dtype = reduce(torch.promote_types, (t.dtype for t in tensors), torch.float32)
    flat = torch.cat([t.to(dtype).flatten() for t in tensors])
    with together():
        dist.all_reduce(flat)
    parts = torch.split(flat, [t.numel() for t in tensors])
    return [part.view_as(t) for part, t in zip(parts, tensors, strict=True)]


def gather(value: Any) -> list[Any]:
    """A plain value of each process, in the order of their ranks."""
    values = [value] * processes()
    if len(values) > 1:
        with together():
            dist.all_gather_object(values, value)
    return values


def refuse_disagreement(values: dict[str, Any]) -> None:
    """Raise ValueError where processes differ in a value, since they would train different things in silence."""
    mine, *others = gather(values)
    for rank, theirs in enumerate(others, start=1):
        for name in mine:
            if mine[name] != theirs[name]:
                raise ValueError(
                    f"the processes differ in {name}: {mine[name]} in process 0, {theirs[name]} in process {rank}. "
                    f"Start all with the same command, the same data and a shared folder for the run."
                )


def launched_processes() -> tuple[str, int]:
    """Who started this process as one of several, and of how many; ("", 1) where nobody did.

    An environment variable alone does not tell: Lightning sets WORLD_SIZE too, and a SLURM batch script that runs no
    `srun` sees the job's variables.
    """
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return "WORLD_SIZE", int(os.environ["WORLD_SIZE"])
    for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"):
        if name in os.environ:
            return name, int(os.environ[name])
    return "", 1


def _leave() -> None:
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def leave_at_exit() -> None:
    """Destroy the process group when the process ends, whatever the backend; gloo's threads abort it otherwise."""
    atexit.unregister(_leave)
    atexit.register(_leave)
