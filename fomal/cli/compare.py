"""The verb compare: several runs in one figure and one table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from rich.table import Table

from fomal.cli.arguments import Arguments
from fomal.cli.errors import UsageError, did_you_mean
from fomal.evaluation.figures import Quantity
from fomal.plots.compare import compare_figure
from fomal.plots.runs import Method, Run, differing_settings, find_runs, methods, read_run
from fomal.plots.save import save_figure
from fomal.utils.files import check_path, check_writable, write_csv
from fomal.utils.output import say, shown, tell
from fomal.utils.terminal import PlainConsole

# Files of a run that a table beside a figure of the same name would replace.
_OF_A_RUN = ("metrics", "predictions")
CAPTION = "± is the 95 % interval over test tasks; it says nothing of training anew."


def run(verb: str, args: Sequence[str]) -> list[Method]:
    """Parse `args`, draw and print; return the methods compared.

    Raises:
        UsageError: there is nothing to compare or to draw.
        ValueError: a file of a run is damaged.
    """
    parser = Arguments(verb, "RUN... --out figure.png [--metric NAME] [--labels TEXT ...]", str(__doc__))
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run, or of several")
    parser.add_argument("--out", type=Path, required=True, help="figure to write; a table is written beside it as .csv")
    parser.add_argument("--metric", help="e.g. accuracy_transductive; by default the first of the runs")
    parser.add_argument("--labels", nargs="+", help="names for the methods, in the order of the table")
    given = parser.parse(args)
    check_figure(given.out)
    found = methods(_read(given.runs))
    if given.labels:
        if len(given.labels) != len(found):
            raise UsageError(
                f"--labels gives {len(given.labels)} names, but there are {len(found)} methods: "
                f"{'; '.join(method.label for method in found)}."
            )
        found = [Method(label, method.runs) for label, method in zip(given.labels, found, strict=True)]
    metric = choose_metric(found, given.metric)
    table = given.out.with_suffix(".csv")
    save(compare_figure(found, metric), given.out)
    write_rows(table, [{"label": method.label} | row for method in found for row in rows(method)])
    print_table(found)
    tell_best(found, metric)
    differing = differing_settings([method.runs for method in found])
    differing = [key for key in differing if key.rpartition(".")[0] not in differing]  # another class says it all
    if differing and not given.labels:
        tell(f"The methods differ in {', '.join(differing)}; labels name the fewest that tell them apart.")
    tell(f"The figure is {given.out}, the table {table}.")
    return found


def _read(paths: Sequence[Path]) -> list[Run]:
    """The runs in the folders; those that have only begun, and have nothing to show yet, are left out."""
    folders: dict[Path, None] = {}
    for path in paths:
        check_path("RUN", path)
        if not path.is_dir():
            raise UsageError(f"{path}: there is no such folder; give the folder of a run, with its metrics.csv.")
        inside = find_runs(path)
        if not inside:
            raise UsageError(f"{path} holds no run: there is neither a metrics.csv nor a results.json in it.")
        folders |= dict.fromkeys(inside)
    runs = [read_run(folder) for folder in folders]
    for one in runs:
        if not one.metrics():
            say(f"{one.folder} is left out: it has neither been validated nor tested yet.")
    if not (shown := [one for one in runs if one.metrics()]):
        raise UsageError("there is nothing to compare: no run has been validated or tested yet.")
    return shown


def check_kind(path: Path, option: str = "--out") -> None:
    """Raise UsageError for a figure that matplotlib does not write."""
    check_writable(option, path)
    kinds = Figure().canvas.get_supported_filetypes()
    if path.suffix.lower().removeprefix(".") not in kinds:
        raise UsageError(f"{option} {path}: a figure can be {', '.join(f'.{kind}' for kind in sorted(kinds))}.")


def check_figure(path: Path) -> None:
    """As `check_kind`; raise UsageError too where the table beside the figure would replace a run's file."""
    check_kind(path)
    table = path.with_suffix(".csv")
    if table.stem.partition("_")[0] in _OF_A_RUN and table.exists():
        raise UsageError(f"--out {path}: its table would replace {table}, which a run wrote; give another name.")


def choose_metric(found: Sequence[Method], asked: str | None = None) -> str:
    """The figure to draw: `asked`, else the first that says how well was learnt.

    Raises:
        UsageError: not every method has it, or they have it in different units or directions.
    """
    there: dict[str, Quantity] = {}
    for method in found:
        for name in method.metrics():
            there.setdefault(name, method.quantity(name))
    first = next((name for name, one in there.items() if one.is_headline), next(iter(there), "accuracy"))
    metric = asked.removeprefix("val/").removeprefix("test/") if asked else first
    _refuse_other_units(found, list(there))
    lacking = [method for method in found if metric not in method.metrics()]
    if not lacking:
        return metric
    common = [name for name in there if all(name in method.metrics() for method in found)]
    remedy = f"in common they have {', '.join(common)}" if common else "they have no metric in common: give fewer runs"
    hint = did_you_mean(metric, common) or f"; {remedy}."
    of = f"{lacking[0].runs[0].folder} has" if len(lacking) < len(found) else "the runs have"
    raise UsageError(f"--metric {metric}: {of} no such figure{hint}")


def _refuse_other_units(found: Sequence[Method], names: Sequence[str]) -> None:
    runs = [run for method in found for run in method.runs]
    for name in names:
        of = {(q.unit, q.higher_is_better): run for run in runs if name in run.metrics() and (q := run.quantity(name))}
        if len(of) > 1:
            (unit, _), (other, _) = list(of)[:2]
            one, two = list(of.values())[:2]
            raise UsageError(
                f"{name} is another metric in {one.folder} (unit {unit!r}) than in {two.folder} (unit {other!r}): "
                f"compare them apart, or give one another name."
            )


def tell_best(found: Sequence[Method], metric: str) -> None:
    """Say which method is best by the test result of a metric, where several have one and it has a direction."""
    higher = found[0].quantity(metric).higher_is_better
    finals = [(final[0], method) for method in found if (final := method.final(metric)) and not math.isnan(final[0])]
    if higher is None or len(finals) < 2:
        return
    best = (max if higher else min)(value for value, _ in finals)
    labels = ", ".join(shown(method.label) for value, method in finals if value == best)
    tell(f"Best by {metric}, of which {'higher' if higher else 'lower'} is better: {labels}.")


def save(figure: Figure, path: Path) -> None:
    """Write a figure; its folder is made."""
    save_figure(figure, path)


def rows(method: Method) -> list[dict[str, object]]:
    """The results of each run of a method, for a table in a file, and of several their mean."""
    found = [row(run) for run in method.runs]
    if len(found) > 1:
        means = {name: method.final(name) for name in method.metrics()}
        figures = _figures({name: mean for name, mean in means.items() if mean is not None})
        found.append({"seed": "mean", "tasks": sum(run.tasks for run in method.runs)} | figures)
    return found


def row(run: Run) -> dict[str, object]:
    """The results of one run, for a table in a file."""
    about = {"seed": run.settings.get("seed_everything"), "meta_iterations": run.meta_iterations, "tasks": run.tasks}
    return about | _figures(run.final) | {"folder": str(run.folder)}


def _figures(final: dict[str, tuple[float, float]]) -> dict[str, object]:
    return {key: value for name, (mean, ci) in final.items() for key, value in ((name, mean), (f"{name}_ci95", ci))}


def write_rows(path: Path, rows: Sequence[dict[str, object]]) -> None:
    """Write rows as CSV, with the columns of all of them."""
    columns = sorted(dict.fromkeys(name for one in rows for name in one), key="folder".__eq__)  # that one last
    write_csv(path, columns, rows)


def print_table(found: Sequence[Method], title: str | None = None) -> None:
    """Print the test results of each method, means over its seeds."""
    table = Table(title=title, caption=CAPTION)
    table.add_column("method", min_width=12, overflow="fold")
    for column in ("seeds", "meta-\niterations", "tasks"):
        table.add_column(column, justify="right")
    names = dict.fromkeys(name for method in found for run in method.runs for name in run.final)
    runs = [run for method in found for run in method.runs]
    quantities = {name: next(run for run in runs if name in run.final).quantity(name) for name in names}
    for name, one in quantities.items():
        table.add_column(shown(one.title).replace(" ", "\n", name.count("_")), justify="right")
    for method in found:
        trained = sorted({run.meta_iterations for run in method.runs if run.meta_iterations is not None})
        tasks = sum(run.tasks for run in method.runs)
        about = [str(len(method.runs)), " to ".join(map(str, trained[:1] + trained[1:][-1:])) or "-", str(tasks or "-")]
        table.add_row(shown(method.label), *about, *(cell(one, method.final(name)) for name, one in quantities.items()))
    PlainConsole().print(table)


def cell(metric: Quantity, estimate: tuple[float, float] | None) -> str:
    """A mean with its interval, in the metric's unit."""
    return "-" if estimate is None else " ± ".join(map(metric.text, estimate))
