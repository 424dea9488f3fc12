"""The verb experiment: run what an experiment file describes, and draw it from the logs."""

from __future__ import annotations

import contextlib
import io
import json
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import yaml
from rich.table import Table

from fomal.cli.arguments import Arguments
from fomal.cli.compare import CAPTION, cell, choose_metric, print_table, row, save, tell_best, write_rows
from fomal.cli.errors import UsageError
from fomal.cli.experiments import Experiment, PlannedRun, Point, experiment_names, read_experiment
from fomal.cli.given import (
    LARGEST_SEED,
    TRUST_HELP,
    Given,
    is_import_path,
    same_value,
    short_key,
    strings,
    with_config_paths,
)
from fomal.evaluation.figures import Quantity
from fomal.plots.compare import compare_figure
from fomal.plots.runs import Method, Run, flat_settings, read_run
from fomal.plots.sweep import sweep_figure
from fomal.utils.checks import countable
from fomal.utils.files import check_writable
from fomal.utils.output import say, shown, tell
from fomal.utils.terminal import PlainConsole

# A test brings its settings from the checkpoint, but not the machine's.
_MACHINE = (
    "data.root",
    "data.cache_dir",
    "data.download",
    "data.num_workers",
    "trainer.accelerator",
    "trainer.devices",
)
_OURS = {
    "--seed_everything": "give --seeds N ...",
    "--config": "the file has a base and settings; others are given as --KEY VALUE.",
    "--ckpt_path": "runs that were interrupted go on from their own.",
    "--trainer.logger": "the folder is given with --out.",
    "--trainer.fast_dev_run": "it would leave nothing to draw; cut runs with --trainer.max_steps.",
}


def run(verb: str, args: Sequence[str]) -> list[Method]:
    """Parse `args`, run what is missing, draw and print; return the methods with their runs.

    Raises:
        UsageError: a mistake in the command line or in the file; nothing has run.
        RuntimeError: at the end, where runs failed.
    """
    usage = "NAME_OR_FILE [--out DIR] [--seeds N ...] [--only TEXT] [--draw] [--KEY VALUE ... for every fit]"
    parser = Arguments(verb, usage, f"{__doc__}\n\nShipped experiments: {', '.join(experiment_names())}.")
    parser.add_argument("name", metavar="NAME_OR_FILE", help="a shipped experiment, or a file like theirs")
    parser.add_argument("--out", type=Path, help="folder of its runs; by default runs/experiments/NAME")
    parser.add_argument("--seeds", type=int, nargs="+", help="seeds to run each method with; by default 0")
    parser.add_argument("--only", default="", help="only the runs whose folder or method contains this")
    parser.add_argument("--draw", action="store_true", help="run nothing; draw what is there")
    parser.add_argument("--trust", action="append", metavar="NAME", help=TRUST_HELP)
    own, extra = split(args)
    given = parser.parse(own)
    experiment = read_experiment(given.name)
    out = given.out or Path("runs/experiments") / experiment.name
    check_writable("out", out / "results.csv")
    for seed in given.seeds or []:
        countable(LARGEST_SEED, seeds=seed)
    if not (wanted := experiment.runs_named(given.only)):
        raise UsageError(f"--only {given.only}: the runs are {', '.join(planned.name for planned in experiment.runs)}.")
    failed: list[str] = []
    if not given.draw:
        todo = [(planned, seed) for seed in dict.fromkeys(given.seeds or [0]) for planned in wanted]
        failed = _run_all(experiment, todo, out, extra, given.trust or [])
    methods = _report(experiment, given.seeds, out, bool(failed))
    if failed:
        raise RuntimeError(
            f"{len(failed)} run{'s' * (len(failed) > 1)} failed: {', '.join(failed[:5])}{', ...' * (len(failed) > 5)}; "
            "the same command tries again."
        )
    return methods


def split(args: Sequence[str]) -> tuple[list[str], list[str]]:
    """The arguments of the verb, and the settings for every fit, which have a dot in their name, with their values."""
    own: list[str] = []
    extra: list[str] = []
    belongs: list[str] = own
    for arg in args:
        name = arg.partition("=")[0]
        for ours, remedy in _OURS.items():
            if name == ours or name.startswith(f"{ours}."):
                raise UsageError(f"{name} is not for an experiment: {remedy}")
        if name.startswith("--"):
            belongs = extra if "." in name else own
            belongs.append(arg)
            if belongs is extra and "=" in arg:
                belongs = own
        else:
            belongs.append(arg)
            if belongs is extra:  # one value each
                belongs = own
    return own, extra


# -- running


def _run_all(
    experiment: Experiment, todo: Sequence[tuple[PlannedRun, int]], out: Path, extra: list[str], trust: list[str]
) -> list[str]:
    """Run what has no results yet; the names of the runs that failed."""
    failed = []
    for planned, seed in todo:
        _tell_differences(planned, planned.folder(out, seed), extra)
    _check_settings(experiment, [planned for planned, seed in todo if not _is_done(planned, seed, out)], out, extra)
    for number, (planned, seed) in enumerate(todo, 1):
        if _is_done(planned, seed, out):
            continue
        folder, what = planned.folder(out, seed), f"[{number}/{len(todo)}] {planned.name}, seed {seed}"
        started = time.monotonic()
        tell(f"{what} ...")
        problem = _fit_and_test(experiment, planned, seed, out, extra, trust)
        if problem:
            failed.append(f"{planned.name} (seed {seed})")
            tell(f"{what} failed: {problem}")
            continue
        results = json.loads((folder / "results.json").read_text())["metrics"]
        figures = [f"{name} {value:.4g}" for name, value in results.items() if value and not name.endswith("_ci95")]
        tell(f"{what}: {', '.join(figures)} ({(time.monotonic() - started) / 60:.1f} min)")
    return failed


def _is_done(planned: PlannedRun, seed: int, out: Path) -> bool:
    return (planned.folder(out, seed) / "results.json").is_file()


def _tell_differences(planned: PlannedRun, folder: Path, extra: Sequence[str]) -> None:
    """Say where a run that is there, or goes on, was made with other settings than the file has now."""
    before = read_run(folder).settings if folder.is_dir() else {}
    given = [short_key(arg.partition("=")[0].lstrip("-")) for arg in extra]
    wrong = [
        f"{key}={before[key]} where the file has {value}"
        for key, value in flat_settings(planned.settings).items()
        if key in before and not same_value(before[key], value) and key not in given
    ]
    if wrong:
        say(f"{folder} was run with {', '.join(wrong)}: remove it to run it anew.")


def _check_settings(experiment: Experiment, runs: Sequence[PlannedRun], out: Path, extra: list[str]) -> None:
    """Raise UsageError for a setting that there is not, before the first run rather than in the last."""
    if not runs:
        return
    from fomal.cli.run import FomalCLI, run_cli  # takes seconds; drawing alone does without

    for planned in {planned.name: planned for planned in runs}.values():
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
                run_cli(FomalCLI, "fit", [*_new(experiment, planned, 0, out), *extra, "--print_config"])
        except UsageError as error:
            raise UsageError(f"{planned.name}: {error}") from error


def _new(experiment: Experiment, planned: PlannedRun, seed: int, out: Path) -> list[str]:
    return ["--config", experiment.base, "--config", yaml.safe_dump(planned.overrides(out, seed))]


def _fit_and_test(
    experiment: Experiment, planned: PlannedRun, seed: int, out: Path, extra: list[str], trust: list[str]
) -> str:
    """Train, or go on training, and test, in processes of their own; what went wrong, or nothing."""
    checkpoint = planned.folder(out, seed) / "checkpoints" / "last.ckpt"
    fit = ["--ckpt_path", str(checkpoint)] if checkpoint.is_file() else _new(experiment, planned, seed, out)
    machine = [
        part for pair in _pairs(extra) if short_key(pair[0].lstrip("-").partition("=")[0]) in _MACHINE for part in pair
    ]
    quiet = ["--trainer.enable_progress_bar", "false"]
    # The experiment's own file says what its checkpoints may use.
    named = strings(Given(with_config_paths([*_new(experiment, planned, seed, out), *extra])).values)
    trusted = [f"--trust={name}" for name in dict.fromkeys([*trust, *filter(is_import_path, named)])]
    problem = _fomal("fit", *fit, *quiet, *extra, *trusted) or _fomal(
        "test", "--ckpt_path", str(checkpoint), *quiet, *machine, *trusted
    )
    if not problem and not _is_done(planned, seed, out):
        return f"its test left no results.json in {planned.folder(out, seed)}"
    return problem


def _pairs(extra: Sequence[str]) -> list[list[str]]:
    """Options, each with its value."""
    pairs: list[list[str]] = []
    for arg in extra:
        if arg.startswith("--"):
            pairs.append([arg])
        else:
            pairs[-1].append(arg)
    return pairs


def _fomal(*args: str) -> str:
    """Run a verb in a process of its own; its error, in one line, or nothing."""
    with subprocess.Popen(
        [sys.executable, "-m", "fomal", *args],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        process_group=0,  # so that a signal reaches it once, from here, whoever it was sent to
    ) as process:
        try:
            output, _ = process.communicate()
        except (KeyboardInterrupt, SystemExit) as stop:
            process.send_signal(signal.SIGINT if isinstance(stop, KeyboardInterrupt) else signal.SIGTERM)
            process.communicate()  # it saves
            raise
    if process.returncode == 0:
        return ""
    lines = [line for line in output.splitlines() if line.strip()]
    own = [line for line in lines if line.startswith("fomal: error: ")]
    if own:
        return own[-1].removeprefix("fomal: error: ")
    return f"exit code {process.returncode}{': ' + lines[-1] if lines else ''}"


# -- drawing


def _report(experiment: Experiment, seeds: Sequence[int] | None, out: Path, failed: bool) -> list[Method]:
    """Draw and print from what the runs left; the methods, with the runs that have results."""
    runs: dict[str, list[Run]] = {planned.name: _finished(planned, seeds, out) for planned in experiment.runs}
    points = [(point, Method(_text(point), runs[point.run.name])) for point in experiment.points]
    methods = [method for _, method in points if method.runs]
    if not methods and failed:
        return []
    if not methods:
        raise UsageError(f"{out} has no finished run of {experiment.name}: leave out --draw to run them.")
    metric = choose_metric(methods)
    table = []
    for point, method in points:
        about = {"panel": point.panel, "at": point.at} if point.panel else {}
        table += [about | {"method": point.method} | row(run) for run in method.runs]
    write_rows(out / "results.csv", table)
    if experiment.points[0].panel:
        figure, panels = out / "sweep.png", _panels(points, metric)
        save(sweep_figure(panels, methods[0].quantity(metric), experiment.title), figure)
        _print_panels(panels, methods[0].quantity(metric), experiment.title)
    else:
        figure = out / "curves.png"
        save(compare_figure(methods, metric, experiment.title), figure)
        print_table(methods, experiment.title)
        tell_best(methods, metric)
    tell(f"{len(methods)} of {len(points)} results are there. The figure is {figure}, the table {out / 'results.csv'}.")
    return methods


def _finished(planned: PlannedRun, seeds: Sequence[int] | None, out: Path) -> list[Run]:
    """The runs with results, of the seeds given or of all that are there."""
    if seeds is None:
        found = [path.parent for path in (out / planned.name).glob("seed_*/results.json")]
        folders = sorted(found, key=lambda folder: (len(folder.name), folder.name))
    else:
        folders = [planned.folder(out, seed) for seed in dict.fromkeys(seeds)]
    return [read_run(folder) for folder in folders if (folder / "results.json").is_file()]


def _text(point: Point) -> str:
    return f"{point.panel} {point.at:g}: {point.method}" if point.panel else point.method


Panels = dict[str, dict[str, dict[float, tuple[float, float]]]]


def _panels(points: Sequence[tuple[Point, Method]], metric: str) -> Panels:
    """The results by panel, method and value; a method without any is there too, so that it keeps its colour."""
    panels: Panels = {}
    for point, method in points:
        values = panels.setdefault(point.panel, {}).setdefault(point.method, {})
        if method.runs and (final := method.final(metric)) is not None:
            values[point.at] = final
    return panels


def _print_panels(panels: Panels, metric: Quantity, title: str) -> None:
    """Print one table for each panel, the methods below each other."""
    tell(f"{title}: {metric.title}")
    for panel, lines in panels.items():
        values = sorted({value for line in lines.values() for value in line})
        if not values:
            continue
        table = Table(title=shown(panel))
        table.add_column("method")
        for value in values:
            table.add_column(f"{value:g}", justify="right", no_wrap=True)
        for method, line in lines.items():
            table.add_row(shown(method), *(cell(metric, line.get(value)) for value in values))
        PlainConsole().print(table)
    tell(CAPTION)
