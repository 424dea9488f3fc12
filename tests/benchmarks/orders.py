"""Time and peak memory of MAML's estimators between first and second order, beside exact MAML.

    python -m tests.benchmarks.orders [--threads N] [--rounds N] [--steps 5 10]

Omniglot's shapes: 5 tasks, 5 ways, mini-batches of 10, 25 query images. Each estimator runs alternately with MAML in
one process, and its time is given as a ratio; the peak is that of a process of its own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from fomal.inner import SGD
from fomal.inner.loop import InnerLoop
from fomal.inner.objective import Objective
from fomal.outer import MAML, BinomialMAML, OuterRule, TruncatedMAML
from fomal.utils import tree
from tests.benchmarks.works import WORKS


def setting(steps: int) -> tuple[InnerLoop, tree.Tree]:
    work = replace(WORKS["omniglot_5way"], inner_steps=steps)
    network, episode = work.network(), work.episode("maml")
    phi = tree.detach(dict(network.named_parameters()))
    return InnerLoop(Objective(network, True), SGD(0.01), {}, work.indices("maml", episode), episode), phi


def seconds(rule: OuterRule, inner: InnerLoop, phi: tree.Tree) -> float:
    started = time.perf_counter()
    rule(inner, phi)
    return time.perf_counter() - started


def ratio(rule: OuterRule, steps: int, rounds: int) -> dict[str, float]:
    """Time as a multiple of MAML's: median and range."""
    inner, phi = setting(steps)
    seconds(rule, inner, phi), seconds(MAML(), inner, phi)
    ratios = [seconds(rule, inner, phi) / seconds(MAML(), inner, phi) for _ in range(rounds)]
    return {"median": statistics.median(ratios), "low": min(ratios), "high": max(ratios)}


def peak_mib(rule: str, steps: int) -> float:
    """Peak resident memory of two runs, beyond that of a gradient, in a process of its own."""
    script = (
        "import re, sys, torch; torch.set_num_threads(1)\n"
        "from fomal.outer import *\nfrom tests.benchmarks.orders import setting\n"
        "peak = lambda: int(re.search(r'VmHWM:\\s*(\\d+)', open('/proc/self/status').read())[1]) / 1024\n"
        f"inner, phi = setting({steps}); TruncatedMAML(0)(inner, phi); before = peak()\n"
        f"[{rule}(inner, phi) for _ in range(2)]; print(peak() - before)"
    )
    return float(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 10])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    for steps in args.steps:
        for order in sorted({0, 1, 2, steps}):
            for rule in (TruncatedMAML(order), BinomialMAML(order)):
                name = type(rule).__name__
                row = {
                    "rule": name,
                    "inner_steps": steps,
                    "order": order,
                    "time_to_maml": ratio(rule, steps, args.rounds),
                }
                row["peak_mib"] = round(peak_mib(f"{name}({order})", steps), 1)
                rows.append(row)
                print(json.dumps(row), flush=True)
    if args.out:
        args.out.write_text(json.dumps({"threads": args.threads, "rounds": args.rounds, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
