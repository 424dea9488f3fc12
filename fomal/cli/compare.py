"""The verb compare: several runs in one figure and one table."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from fomal.cli.arguments import Arguments
from fomal.cli.errors import UsageError
from fomal.plots.compare import compare_figure, scale_of
from fomal.plots.runs import Method, Run, find_runs, methods, read_run


def run(verb: str, args: Sequence[str]) -> list[Method]:
    """Parse `args`, draw and print; return the methods compared."""
    parser = Arguments(verb, "RUN... --out figure.png [--metric NAME] [--labels TEXT ...]", str(__doc__))
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run, or of several")
    parser.add_argument("--out", type=Path, required=True, help="figure to write; a table is written beside it as .csv")
    parser.add_argument("--metric", help="e.g. accuracy_transductive; by default accuracy, or loss")
    parser.add_argument("--labels", nargs="+", help="names for the methods, in the order of the table")
    given, unknown = parser.parse_known_args(list(args))
    parser.refuse_unknown(unknown)
    check_figure(given.out)
    found = methods([read_run(folder) for folder in _folders(given.runs)])
    if given.labels:
        if len(given.labels) != len(found):
            raise UsageError(
                f"--labels gives {len(given.labels)} names, but there are {len(found)} methods: "
                f"{'; '.join(method.label for method in found)}."
            )
        found = [Method(label, method.runs) for label, method in zip(given.labels, found, strict=True)]
    metric = choose_metric(found, given.metric)
    save(compare_figure(found, metric), given.out)
    write_rows(given.out.with_suffix(".csv"), [{"label": m.label} | row(r) for m in found for r in m.runs])
    print_table(found)
    print(f"The figure is {given.out}, the table {given.out.with_suffix('.csv')}.")
    return found


def _folders(paths: Sequence[Path]) -> list[Path]:
    found: dict[Path, None] = {}
    for path in paths:
        if not path.is_dir():
            raise UsageError(f"{path}: there is no such folder; give the folder of a run, with its metrics.csv.")
        inside = find_runs(path)
        if not inside:
            raise UsageError(f"{path} holds no run: there is neither a metrics.csv nor a results.json in it.")
        found |= dict.fromkeys(inside)
    return list(found)


def check_figure(path: Path) -> None:
    """Raise UsageError for a kind of figure that matplotlib does not write."""
    kinds = Figure().canvas.get_supported_filetypes()
    if path.suffix.removeprefix(".") not in kinds:
        raise UsageError(f"--out {path}: a figure can be {', '.join(f'.{kind}' for kind in sorted(kinds))}.")


def choose_metric(found: Sequence[Method], asked: str | None) -> str:
    """The figure to draw; UsageError where not every method has it."""
    common = [name for name in found[0].metrics() if all(name in method.metrics() for method in found)]
    if asked is not None and asked not in common:
        raise UsageError(f"--metric {asked}: the runs have in common {', '.join(common) or 'no metric'}.")
    if asked is not None:
        return asked
    for name in ("accuracy", "loss"):
        if name in common:
            return name
    raise UsageError("the runs have no metric in common: compare classification with classification, or give fewer.")


def save(figure: Figure, path: Path) -> None:
    """Write a figure; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def row(run: Run) -> dict[str, object]:
    """The results of one run, for a table in a file."""
    figures = {
        key: value for name, (mean, ci) in run.final.items() for key, value in ((name, mean), (f"{name}_ci95", ci))
    }
    about = {"seed": run.settings.get("seed_everything"), "meta_iterations": run.meta_iterations, "tasks": run.tasks}
    return {"folder": str(run.folder)} | about | figures


def write_rows(path: Path, rows: Sequence[dict[str, object]]) -> None:
    """Write rows as CSV, with the columns of all of them."""
    columns = dict.fromkeys(name for one in rows for name in one)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(columns))
        writer.writeheader()
        writer.writerows(rows)


def print_table(found: Sequence[Method], title: str | None = None) -> None:
    """Print the test results of each method, means over its seeds."""
    names = dict.fromkeys(name for method in found for run in method.runs for name in run.final)
    table = Table(title=title, caption="± is the 95 % interval over test tasks; it says nothing of training anew.")
    table.add_column("method")
    for column in ("seeds", "meta-\niterations", "tasks"):
        table.add_column(column, justify="right")
    for name in names:
        unit = scale_of(name)[1]
        table.add_column(f"{name.replace('_', chr(10))}{',' if unit else ''}{unit}", justify="right", no_wrap=True)
    for method in found:
        first, cells = method.runs[0], []
        for name in names:
            final, (scale, unit) = method.final(name), scale_of(name)
            digits = ".2f" if unit else ".4f"
            cells.append("-" if final is None else f"{scale * final[0]:{digits}} ± {scale * final[1]:{digits}}")
        about = (first.meta_iterations, first.tasks or None)
        table.add_row(method.label, str(len(method.runs)), *("-" if a is None else str(a) for a in about), *cells)
    Console().print(table)
