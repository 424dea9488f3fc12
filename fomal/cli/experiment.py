"""The verb experiment: run what an experiment file describes, and draw it from the logs."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import yaml

from fomal.cli.arguments import Arguments
from fomal.cli.compare import choose_metric, print_table, row, save, write_rows
from fomal.cli.errors import UsageError
from fomal.cli.experiments import Experiment, PlannedRun, read_experiment
from fomal.plots.compare import compare_figure
from fomal.plots.runs import Method, Run, read_run
from fomal.plots.sweep import sweep_figure

# A test brings its settings from the checkpoint, but not the machine's.
_MACHINE = ("--trainer.accelerator", "--trainer.devices")


def run(verb: str, args: Sequence[str]) -> list[Method]:
    """Parse `args`, run what is missing, draw and print; return the methods with their runs.

    Raises:
        UsageError: at the end, where runs failed.
    """
    usage = "NAME_OR_FILE [--out DIR] [--seeds N ...] [--only TEXT] [--draw] [--KEY VALUE ... for every fit]"
    parser = Arguments(verb, usage, str(__doc__))
    parser.add_argument("name", metavar="NAME_OR_FILE", help="a shipped experiment, or a file like theirs")
    parser.add_argument("--out", type=Path, help="folder of its runs; by default runs/experiments/NAME")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="seeds to run each method with")
    parser.add_argument("--only", default="", help="only the runs whose name contains this")
    parser.add_argument("--draw", action="store_true", help="run nothing; draw what is there")
    given, extra = parser.parse_known_args(list(args))
    experiment = read_experiment(given.name)
    out = given.out or Path("runs/experiments") / experiment.name
    wanted = [planned for planned in experiment.runs if given.only in planned.name]
    if not wanted:
        raise UsageError(f"--only {given.only}: the runs are {', '.join(planned.name for planned in experiment.runs)}.")
    failed = [] if given.draw else _run_all(experiment, wanted, given.seeds, out, extra)
    methods = _report(experiment, given.seeds, out)
    if failed:
        raise UsageError(f"{len(failed)} runs failed: {', '.join(failed)}; the same command tries them again.")
    return methods


def _run_all(
    experiment: Experiment, wanted: Sequence[PlannedRun], seeds: Sequence[int], out: Path, extra: list[str]
) -> list[str]:
    """Run what has no results yet; the names of the runs that failed."""
    failed = []
    todo = [(planned, seed) for seed in seeds for planned in wanted]
    for number, (planned, seed) in enumerate(todo, 1):
        folder, what = planned.folder(out, seed), f"[{number}/{len(todo)}] {planned.name}, seed {seed}"
        if (folder / "results.json").is_file():
            continue
        started = time.monotonic()
        print(f"{what} ...", flush=True)
        problem = _fit_and_test(experiment, planned, seed, out, extra)
        if problem:
            failed.append(f"{planned.name} (seed {seed})")
            print(f"{what} failed: {problem}", flush=True)
            continue
        results = json.loads((folder / "results.json").read_text())["metrics"]
        figures = [f"{name} {value:.4f}" for name, value in results.items() if not name.endswith("_ci95")]
        print(f"{what}: {', '.join(figures)} ({(time.monotonic() - started) / 60:.1f} min)", flush=True)
    return failed


def _fit_and_test(experiment: Experiment, planned: PlannedRun, seed: int, out: Path, extra: list[str]) -> str:
    """Train, or go on training, and test, in processes of their own; what went wrong, or nothing."""
    checkpoint = planned.folder(out, seed) / "checkpoints" / "last.ckpt"
    quiet = ["--trainer.enable_progress_bar", "false"]
    if checkpoint.is_file():
        fit = ["--ckpt_path", str(checkpoint)]
    else:
        fit = ["--config", experiment.base, "--config", yaml.safe_dump(planned.overrides(out, seed)), *extra]
    machine = [arg for arg in _as_pairs(extra) if arg.startswith(_MACHINE)]
    return _fomal("fit", *fit, *quiet) or _fomal("test", "--ckpt_path", str(checkpoint), *machine, *quiet)


def _as_pairs(args: Sequence[str]) -> list[str]:
    """Options with their values as `--key=value`."""
    pairs: list[str] = []
    for arg in args:
        if arg.startswith("--") or not pairs:
            pairs.append(arg)
        else:
            pairs[-1] += f"={arg}"
    return pairs


def _fomal(*args: str) -> str:
    """Run a verb in a process of its own; its error, in one line, or nothing."""
    with subprocess.Popen(
        [sys.executable, "-m", "fomal", *args], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            output, _ = process.communicate()
        except KeyboardInterrupt:  # it has had the same signal, and is saving
            process.wait()
            raise
    if process.returncode == 0:
        return ""
    lines = [line for line in output.splitlines() if line.strip()] or [f"exit code {process.returncode}"]
    own = [line for line in lines if line.startswith("fomal: error: ")]
    return (own or lines)[-1].removeprefix("fomal: error: ")


def _report(experiment: Experiment, seeds: Sequence[int], out: Path) -> list[Method]:
    """Draw and print from what the runs left; the methods, with the runs that have results."""
    runs: dict[Path, Run] = {}
    rows: list[dict[str, object]] = []
    panels: dict[str, dict[str, dict[float, tuple[float, float]]]] = {}
    methods: dict[str, Method] = {}
    for point in experiment.points:
        folders = [point.run.folder(out, seed) for seed in seeds]
        finished = [folder for folder in folders if (folder / "results.json").is_file()]
        for folder in finished:
            runs.setdefault(folder, read_run(folder))
            about = {"panel": point.panel, "at": point.at} if point.panel else {}
            rows.append({"method": point.method, **about, **row(runs[folder])})
        if finished:
            label = f"{point.panel} {point.at:g}: {point.method}" if point.panel else point.method
            methods[label] = Method(label, [runs[folder] for folder in finished])
    if not methods:
        raise UsageError(f"{out} has no finished run of {experiment.name}: leave out --draw to run them.")
    metric = choose_metric(list(methods.values()), None)
    for point in experiment.points:
        label = f"{point.panel} {point.at:g}: {point.method}" if point.panel else point.method
        final = methods[label].final(metric) if label in methods else None
        if point.panel and final is not None:
            panels.setdefault(point.panel, {}).setdefault(point.method, {})[point.at] = final
    figure = out / ("sweep.png" if panels else "curves.png")
    if panels:
        save(sweep_figure(panels, metric, experiment.title), figure)
    else:
        save(compare_figure(list(methods.values()), metric, experiment.title), figure)
    write_rows(out / "results.csv", rows)
    print_table(list(methods.values()), experiment.title)
    finished_runs, all_runs = len(methods), len(experiment.points)
    print(f"{finished_runs} of {all_runs} points are there. The figure is {figure}, the table {out / 'results.csv'}.")
    return list(methods.values())
