"""Processes that end in several ways."""

from __future__ import annotations

import torch
import torch.distributed as dist

from fomal.utils.processes import (
    leave_at_exit,
    sum_over_processes,
)


def joined() -> int:
    dist.init_process_group("gloo")
    return dist.get_rank()


def end_with(how: str) -> None:
    joined()
    leave_at_exit()
    sum_over_processes([torch.ones(10)])
    if how == "an error":
        raise ValueError("an error")
