"""The same work through fomal and through each peer that is installed, in turn, in one process.

    python -m tests.benchmarks [--works omniglot_5way ...] [--rules reptile ...] [--peers loop ...]
                               [--as traced ...] [--precision 32 ...] [--device cpu] [--json FILE]

Every pair is first checked to compute the same: in float64, and in float32 as it is timed. Then the two run
alternately, and the peer's time is given as a multiple of fomal's, round by round. A meta-iteration is its inner loops
and the outer gradient, with tasks and mini-batches at hand; "evaluation" adapts a batch of tasks by 50 steps and
predicts under both protocols; "fit" is a whole training with Reptile, through the Trainer and as a bare loop, tasks
drawn in both. "fomaml" is the released Reptile code's, "query_fomaml" Finn et al.'s first-order MAML. Operations are
those that torch.utils.flop_counter counts in the plain loop: convolutions and matrix products.

--as says how fomal runs: "plain" as its functions are written, "traced" as it does unless told otherwise, "compiled"
with its traces compiled, "captured" as a CUDA graph, with the drawing of the mini-batches and, in "fit" and
"trainer", of the tasks in it, and in "fit" ten meta-iterations per step of the Trainer. Where fomal falls back to
another way, the row fails.

Three kinds have no peer: "trainer", the Trainer's share of a meta-iteration, with one and with ten of them per step;
"replicas", several runs in one program beside one alone; "memory", the peak at 5 and at 50 inner steps.
--precision bf16 times fomal under autocast beside itself and the loop in 32 bits.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fomal.engine.cuda_graph import CAPTURES
from tests.benchmarks import memory, precision, replicas, trainer
from tests.benchmarks.machine import measure, pin
from tests.benchmarks.measure import compare
from tests.benchmarks.ours import quiet
from tests.benchmarks.peers import PEERS
from tests.benchmarks.table import PARTS, named, table
from tests.benchmarks.works import KINDS, RUN_AS, WORKS, Work

ALONE = {"trainer": trainer.rows, "replicas": replicas.rows, "memory": memory.rows}
RULES = (*KINDS, *ALONE)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        "tests.benchmarks", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    made.add_argument("--works", nargs="+", choices=WORKS, default=list(WORKS), metavar="WORK", help=", ".join(WORKS))
    made.add_argument("--rules", nargs="+", choices=RULES, default=list(RULES), metavar="RULE", help=", ".join(RULES))
    made.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS), metavar="PEER", help=", ".join(PEERS))
    made.add_argument(
        "--as", nargs="+", choices=RUN_AS, default=["traced"], dest="run_as", metavar="WAY", help=", ".join(RUN_AS)
    )
    made.add_argument("--precision", nargs="+", choices=("32", "bf16"), default=["32"], help="default: 32")
    made.add_argument("--rounds", type=int, default=10, help="default: 10")
    made.add_argument("--replicas", type=int, default=8, help="default: 8")
    made.add_argument("--iterations", type=int, help="of fit, trainer and replicas; default: the work's own")
    made.add_argument("--threads", type=int, default=1, help="cores to which all is confined; default: 1")
    made.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    made.add_argument("--json", type=Path, metavar="FILE", help="where to write all figures, as they come")
    return made


def main(args: list[str] | None = None) -> dict[str, Any]:
    """Run, print a table, write and return all figures."""
    given = parser().parse_args(args)
    for name in ("rounds", "threads", "replicas", "iterations"):
        if (value := getattr(given, name)) is not None and value < 1:
            raise SystemExit(f"--{name} {value} must be at least 1.")
    if "captured" in given.run_as and given.device not in CAPTURES:
        raise SystemExit(f"--as captured needs --device cuda: there are no CUDA graphs on {given.device}.")
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
        "absent": absent,
        "rows": [],
        **{part: [] for part in PARTS},
    }
    for name, kind in itertools.product(given.works, given.rules):
        iterations = given.iterations or WORKS[name].fit_iterations
        work = replace(WORKS[name], device=given.device, fit_iterations=iterations)
        for part, row in found(work, kind, given, absent, result["machine"]["matrix_product_flops"]):
            result[part].append(row)
            print(f"{named(row)}: {row['status']}", file=sys.stderr, flush=True)
            if given.json:  # each time, for a run that is ended early
                given.json.write_text(json.dumps(result, indent=2) + "\n")
    print(table(result))
    return result


def found(
    work: Work, kind: str, given: argparse.Namespace, absent: dict[str, str], peak: float
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows as they come, each with the part of the result that it belongs to."""
    if kind in ALONE:
        yield from ((kind, row) for row in ALONE[kind](work, given))
        return
    for peer in given.peers if "32" in given.precision else []:
        if peer in absent:
            row = {"work": work.name, "rule": kind, "peer": peer, "status": "absent", "reason": absent[peer]}
            yield "rows", row
            continue
        for row in compare(work, kind, PEERS[peer], given.run_as, given.rounds, peak):
            yield "rows", row
    if "bf16" in given.precision:
        yield from (("precision", row) for row in precision.rows(work, kind, given.run_as, given.rounds))


if __name__ == "__main__":
    main()
