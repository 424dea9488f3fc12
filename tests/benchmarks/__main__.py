"""The same work through fomal and through each peer that is installed, in turn, in one process.

    python -m tests.benchmarks [--works omniglot_5way ...] [--rules reptile ...] [--peers loop ...] [--json FILE]

Every pair is first checked to compute the same: in float64, and in float32 as it is timed. Then the two run
alternately, and the peer's time is given as a multiple of fomal's, round by round. A meta-iteration is its inner loops
and the outer gradient, with tasks and mini-batches at hand; "evaluation" adapts a batch of tasks by 50 steps and
predicts under both protocols; "fit" is a whole training with Reptile, through the Trainer and as a bare loop, tasks
drawn in both. "fomaml" is the released Reptile code's, "query_fomaml" Finn et al.'s first-order MAML. Operations are
those that torch.utils.flop_counter counts in the plain loop: convolutions and matrix products.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks.machine import measure, pin
from tests.benchmarks.measure import compare
from tests.benchmarks.ours import quiet
from tests.benchmarks.peers import PEERS
from tests.benchmarks.table import table
from tests.benchmarks.works import KINDS, WORKS


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        "tests.benchmarks", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    made.add_argument("--works", nargs="+", choices=WORKS, default=list(WORKS), metavar="WORK", help=", ".join(WORKS))
    made.add_argument("--rules", nargs="+", choices=KINDS, default=list(KINDS), metavar="RULE", help=", ".join(KINDS))
    made.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS), metavar="PEER", help=", ".join(PEERS))
    made.add_argument("--rounds", type=int, default=10, help="default: 10")
    made.add_argument("--threads", type=int, default=1, help="cores to which all is confined; default: 1")
    made.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    made.add_argument(
        "--compiled", action="store_true", help="fomal compiles its recordings (with fit, each time anew)"
    )
    made.add_argument("--json", type=Path, metavar="FILE", help="where to write all figures, as they come")
    return made


def main(args: list[str] | None = None) -> dict[str, Any]:
    """Run, print a table, write and return all figures."""
    given = parser().parse_args(args)
    if given.rounds < 1 or given.threads < 1:
        raise SystemExit(f"--rounds {given.rounds} and --threads {given.threads} must be at least 1.")
    pin(given.threads)
    quiet()
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # JAX would take most of a GPU's memory
    torch.backends.cudnn.allow_tf32 = False  # all in float32 proper, so that updates can be compared
    absent = {name: reason for name in given.peers if (reason := PEERS[name].available(given.device))}
    installed = [PEERS[name] for name in given.peers if name not in absent]
    result: dict[str, Any] = {
        "versions": {"torch": torch.__version__} | {peer.package: peer.version() for peer in installed if peer.package},
        "machine": measure(given.device),
        "rounds": given.rounds,
        "compiled": given.compiled,
        "absent": absent,
        "rows": [],
    }
    for work, kind in itertools.product(given.works, given.rules):
        for peer in given.peers:
            row = {"work": work, "rule": kind, "peer": peer, "status": "absent", "reason": absent.get(peer)}
            if peer not in absent:
                peak = result["machine"]["matrix_product_flops"]
                made = replace(WORKS[work], device=given.device, compiled=given.compiled)
                row = compare(made, kind, PEERS[peer], given.rounds, peak)
            result["rows"].append(row)
            print(f"{work}, {kind}, {peer}: {row['status']}", file=sys.stderr, flush=True)
            if given.json:  # each time, for a run that is ended early
                given.json.write_text(json.dumps(result, indent=2) + "\n")
    print(table(result))
    return result


if __name__ == "__main__":
    main()
