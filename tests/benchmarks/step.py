"""Time of one Reptile meta-iteration beside a Python loop over tasks, and peak memory against the number of steps.

    python -m tests.benchmarks.step [--threads N] [--rounds N] [--ways 5]

The two sides run alternately in one process, on the same episodes, after a check that they compute the same update.
The loop is the ordinary way to write it: a deep copy of the network and `torch.optim` for each task.
"""

from __future__ import annotations

import argparse
import copy
import json
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from fomal import tree
from fomal.data.episode import Episode
from fomal.data.sampler import minibatch_plan
from fomal.inner import Adam
from fomal.inner.objective import Objective
from fomal.inner.rollout import InnerLoop
from fomal.models import Conv4
from fomal.outer import Reptile


def problem(ways: int, tasks: int = 5, shots: int = 10) -> tuple[Conv4, Episode]:
    """Omniglot's shapes, with random images."""
    torch.manual_seed(0)
    labels = torch.arange(ways).repeat_interleave(shots).expand(tasks, -1)
    x = torch.rand(tasks, ways * shots, 1, 28, 28).round()
    return Conv4(ways), Episode(x, labels, x[:, :0], labels[:, :0], torch.arange(tasks), ways)


def vectorised(network: Conv4, episode: Episode, steps: int, batch: int) -> dict[str, torch.Tensor]:
    """fomal's way, with the drawing of the mini-batches."""
    phi = tree.detach(dict(network.named_parameters()))
    plan = minibatch_plan(0, 0, episode.number, episode.support_x.shape[1], steps, batch)
    optimizer = Adam(1e-3)
    inner = InnerLoop(Objective(network, True), optimizer, optimizer.init(phi), plan, episode)
    return Reptile()(inner, phi)[0]


def looped(network: Conv4, episode: Episode, steps: int, batch: int) -> dict[str, torch.Tensor]:
    """The ordinary way."""
    plan = minibatch_plan(0, 0, episode.number, episode.support_x.shape[1], steps, batch)
    total = {name: torch.zeros_like(p) for name, p in network.named_parameters()}
    for t in range(episode.tasks):
        copied = copy.deepcopy(network)
        optimizer = torch.optim.Adam(copied.parameters(), lr=1e-3, betas=(0.0, 0.999))
        for index in plan:
            optimizer.zero_grad()
            F.cross_entropy(copied(episode.support_x[t][index[t]]), episode.support_y[t][index[t]]).backward()
            optimizer.step()
        for name, p in copied.named_parameters():
            total[name] += p.detach() / episode.tasks
    return {name: p.detach() - total[name] for name, p in network.named_parameters()}


def compare(ways: int, rounds: int) -> dict[str, object]:
    """Check that both compute the same, then time them in turn."""
    steps, batch = (5, 10) if ways == 5 else (10, 20)
    network, episode = problem(ways)
    a, b = (side(network.double(), episode.floating(torch.float64), 2, batch) for side in (vectorised, looped))
    worst = max(float((a[name] - b[name]).abs().max()) for name in a)
    if worst > 1e-9:
        raise SystemExit(f"the two sides differ by {worst}")
    network = network.float()
    times: dict[str, list[float]] = {"vectorised": [], "loop": []}
    for _ in range(rounds):
        for name, side in (("vectorised", vectorised), ("loop", looped)):
            start = time.perf_counter()
            side(network, episode, steps, batch)
            times[name].append(time.perf_counter() - start)
    ratios = [loop / ours for loop, ours in zip(times["loop"][2:], times["vectorised"][2:], strict=True)]
    median = {name: statistics.median(values[2:]) for name, values in times.items()}  # two rounds to warm up
    return {
        "ways": ways,
        "threads": torch.get_num_threads(),
        "seconds_per_meta_iteration": median,
        "loop_over_vectorised": {
            "median": statistics.median(ratios),
            "min": min(ratios),
            "max": max(ratios),
        },
    }


def peak_memory(ways: int, steps: int) -> float:
    """Peak resident memory, MiB, of a process that runs one meta-iteration of so many inner steps."""
    command = [sys.executable, "-m", "tests.benchmarks.step", "--ways", str(ways), "--peak", str(steps)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def main() -> None:
    """Run and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", type=int, default=5, choices=(5, 20))
    parser.add_argument("--threads", type=int, default=None, help="torch's threads; default: torch's own choice")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--peak", type=int, default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.peak:
        vectorised(*problem(args.ways), args.peak, 10)
        # Not getrusage: across fork and exec its peak is at least the parent's.
        print(int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024)
        return
    result = compare(args.ways, args.rounds)
    result["peak_mib"] = {f"{steps} inner steps": peak_memory(args.ways, steps) for steps in (5, 50)}
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
